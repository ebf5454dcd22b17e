"""Small grids of runs that answer a claim: what is asked, what ran, what it says. No torch."""
