"""What passes between the stages: recipe, run folder, manifest, records, events, exit codes.

Imports neither torch nor any heavy library, so that commands answer at once.
"""
