"""The networks under T5X: what its gin files name and T5X lacks. Needs T5X, which is not on the package index; see docs/t5x.md.

`partitioner` is the project's mesh behind T5X's interface, `optimizer_definition` the project's optimizers and the factor
rules of Adafactor, `vocabulary` what a task and a network agree on, and `python -m t5x_ssm.integrations.t5x` the start
of T5X's programs, pods included.
"""
