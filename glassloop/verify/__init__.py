"""`glassloop verify`: one set of updates in right and faulty ways.

The faults must be noticed.

problem.py makes the tiny model and its rows, formula.py carries the updates out without the loop,
members.py names the ways, mutants.py the faulty ones, worker.py runs them in launched processes,
processes.py starts and watches those, results.py judges and against.py compares.

May import train_loop and above.
"""
