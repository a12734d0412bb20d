"""What the zoo promises to learn: `python -m benchmarks.proof [NAME...]` writes JSON beside it.

A proof is a module here with `BARS` (name -> function that returns its facts, `passed` and
`required` among them).
"""
