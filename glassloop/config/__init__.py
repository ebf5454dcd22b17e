"""What a run is asked: sections, presets, command line, YAML. No torch.

Imports no other room.
"""
