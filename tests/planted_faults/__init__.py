"""What the tests find: faults planted one at a time in a copy of the library, and the test files that see each.

`python -m tests.planted_faults` measures; its result is `TABLE.md`. The faults stand in `faults/*.toml`.
"""
