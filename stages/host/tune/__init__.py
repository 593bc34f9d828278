"""`lorry tune`: from a file of conversations and a model to a recipe, a run, and scores; start at job.py.

base.py finds what a model's folder says, data.py what the data are, values.py what follows from both, recipe_text.py
writes it as a recipe with a reason for each value.
"""
