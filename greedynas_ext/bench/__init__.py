"""How long `evaluate_paths` takes against PyTorch: `python -m greedynas_ext.bench`.

`cases` says what is measured, as data; `subjects` and `inputs` make it; `ways` are PyTorch's ways to the same losses;
`contest` measures a case, `ceilings` what the machine could do; `table`, `plot` and `compare` read results.
"""
