"""The type checker that the test run puts on annotated functions (see conftest.py)."""

from beartype import BeartypeConf, beartype

# An int may stand where a float is asked for, as in every static type checker.
typecheck = beartype(conf=BeartypeConf(is_pep484_tower=True))
