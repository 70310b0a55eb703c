"""What an environment measures at every step beside its reward, and how means of it are named.

A task's metrics are a dict of these kinds:

- a tensor `[]`: one number, named as the dict says;
- `Parts`: numbers alike, one for each of some named parts, as torques are of joints;
- `Ratio`: a quotient of two numbers that are averaged apart.

All are trees of tensors, so transforms map over them and whoever averages does so leaf by leaf; `scalars` then gives
each number a name of its own. Nothing here knows what is measured, or where it is written to.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rlcore.errors import InputError
from rlcore.tree import pytree, static


@pytree
class Parts:
    """Numbers alike: one measurement with a value for each of some parts, logged as `METRIC/PART`.

    One vector costs an environment's step far less than as many tensors of one number.

    Attributes:
      values: `[n]`, or `[..., n]` of many robots or steps.
      parts: the n names.
    """

    values: Tensor
    parts: tuple[str, ...] = static()


@pytree
class Ratio:
    """A quotient of means, `mean(over) / mean(under)`, as energy per distance is; the mean of quotients is another.

    A step for which the quotient says nothing has 0 in both, and so does not count. Where no step counts it is NaN.

    Attributes:
      over, under: `[]`, or `[...]` of many robots or steps.
    """

    over: Tensor
    under: Tensor


def scalars(metrics: Mapping[str, Any]) -> dict[str, Tensor]:
    """Each number under a name of its own: those of `Parts` as `METRIC/PART`, a `Ratio` as its quotient.

    Args:
      metrics: as they were measured, or averaged over any axes: tensors `[...]`, `Parts` of `[..., n]`, `Ratio`.

    Returns:
      Tensors of one shape `[...]`, by name.

    Raises:
      InputError: if two numbers have one name.
    """
    named: list[tuple[str, Tensor]] = []
    for name, value in metrics.items():
        if isinstance(value, Parts):
            values = value.values.unbind(-1)
            named += [(f"{name}/{part}", number) for part, number in zip(value.parts, values, strict=True)]
        elif isinstance(value, Ratio):
            named.append((name, value.over / value.under))
        else:
            named.append((name, value))
    found = dict(named)
    if len(found) < len(named):
        names = [name for name, _ in named]
        raise InputError(f"metrics need different names, got {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def check_metrics(metrics: Mapping[str, Any]) -> None:
    """Check the metrics of one robot and one step.

    Raises:
      InputError: unless each is one number `[]`, `Parts` with a number for each name, or a `Ratio` of two numbers,
        and all have names of their own.
    """
    for name, value in metrics.items():
        if isinstance(value, Parts):
            if value.values.shape != (len(value.parts),):
                wanted = f"[{len(value.parts)}] for {', '.join(value.parts)}"
                raise InputError(f"metric {name!r} must be {wanted}, got shape {list(value.values.shape)}")
        else:
            for number in (value.over, value.under) if isinstance(value, Ratio) else (value,):
                if number.ndim != 0:
                    raise InputError(f"metric {name!r} must be one number [], got shape {list(number.shape)}")
    scalars(metrics)
