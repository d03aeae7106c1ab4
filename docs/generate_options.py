"""docs/options.md from the code: names, types, defaults and the text under each option.

    python docs/generate_options.py             # print the page
    python docs/generate_options.py --update    # write it

tests/test_docs.py compares the committed page with `page()`.
"""

import argparse
import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path

from grass_fx import AdamW
from grass_fx.config import COMPILERS, MODES, RULES, SCORINGS, SIDES, GrassConfig

PAGE = Path(__file__).with_name("options.md")
VALUES = {
    "selection": tuple(RULES),
    "side": SIDES,
    "scoring": SCORINGS,
    "compiler": COMPILERS,
    "mode": MODES,
    "on_refresh": ("carry", "reset"),
}
OWN = ("scale", "warmup_steps", "on_refresh", "stochastic_rounding", "compile", "seed")
"""What AdamW takes beside torch's arguments."""

HEAD = """\
# Options

<!-- Written by docs/generate_options.py --update, from grass_fx/config.py and grass_fx.AdamW. -->

Options go to `torch.compile`; those of the update go to the optimizer. One that is unknown,
impossible or contradicts another is an `OptionError`, which names it and the nearest valid value.

```python
import torch
import grass_fx

model = torch.nn.Linear(64, 64)
compiled = torch.compile(model, backend="grass", options={"rank": 16, "selection": "top"})
optimizer = grass_fx.AdamW(model.parameters(), lr=1e-3, scale=2.0)
```

Where only a backend's name fits, as in the configuration files of torchtitan, give the options a
name, or put them into the environment of a process that passes none:

```python
grass_fx.register_backend("grass_eighth", rank=0.125, refresh_every=200)
compiled = torch.compile(model, backend="grass_eighth")
```

    GRASS_FX_OPTIONS='{"rank": 0.125, "refresh_every": 200}' python train.py  # backend="grass"

Both are validated like `options`, and a line of the [log](logs.md) names them.

The symbols and equation numbers are those of [method.md](method.md), which also has the
[evidence for the defaults](method.md#defaults-and-why).

## Options of the backend
"""

RULES_HEAD = """\
## The rules

What each one selects: [selection-rules.md](selection-rules.md). A rule that looks at norms
compiles a second variant of each graph, which runs in the last step of each period.

| rule | looks at norms of | can draw with replacement |
|---|---|---|
"""

OPTIMIZER_HEAD = """\
## Options of the optimizer

`grass_fx.AdamW` takes torch's `lr`, `betas`, `eps`, `weight_decay`, `foreach` and `fused`, and
these. `grass_fx.subspace(X)` of any optimizer class X takes `scale`, `warmup_steps`,
`on_refresh` and `stochastic_rounding` beside its own. All but `seed` can differ between parameter
groups. How they act: [optimizers.md](optimizers.md).
"""


def described(text: str) -> str:
    """A docstring as Markdown: roles, double backticks and quoted values become code."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"`\1`", " ".join(text.split()))
    text = text.replace("``", "`")
    text = re.sub(r'(?<![`\w=])"[\w-]+"(?![`\w])', r"`\g<0>`", text)
    start = text[0].upper() if text[0].isascii() else text[0]  # but not of a Greek symbol
    return textwrap.fill(start + text[1:], 100, break_on_hyphens=False)


def texts() -> dict[str, str]:
    """The string under each field of GrassConfig."""
    (body,) = ast.parse(inspect.getsource(GrassConfig)).body
    pairs = zip(body.body, body.body[1:], strict=False)
    return {
        field.target.id: ast.literal_eval(text.value)
        for field, text in pairs
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def arguments() -> dict[str, str]:
    """The text of each argument in the docstring of AdamW."""
    _, _, rest = inspect.getdoc(AdamW).partition("Args:\n")
    listed, _, _ = rest.partition("\n\n")
    return dict(re.findall(r"^    (\w+): (.*(?:\n      .*)*)", listed, re.M))


def quoted(value: object) -> str:
    return f'`"{value}"`' if isinstance(value, str) else f"`{value}`"


def section(name: str, kind: str, default: object, text: str) -> str:
    facts = [f"type `{kind}`", f"default {quoted(default)}"]
    if name in VALUES:
        facts.append("one of " + ", ".join(map(quoted, VALUES[name])))
    return f"### {name}\n\n*{'; '.join(facts)}*\n\n{described(text)}\n"


def rules() -> str:
    """The table of selection rules."""
    answer = {True: "yes", False: "no"}
    looked = {"": "no", "gradient": "gradients", "input": "inputs"}
    rows = [
        f'| `"{name}"` | {looked[rule.scores]}{", once" if rule.freezes else ""} '
        f"| {answer[rule.replacement]} |"
        for name, rule in RULES.items()
    ]
    return RULES_HEAD + "\n".join(rows) + "\n"


def page() -> str:
    """The whole page."""
    of_fields, of_arguments = texts(), arguments()
    parts = [HEAD]
    for field in fields(GrassConfig):
        factory = field.default_factory
        default = field.default if factory is MISSING else factory()
        parts.append(section(field.name, str(field.type), default, of_fields[field.name]))
    parts += [rules(), OPTIMIZER_HEAD]
    signature = inspect.signature(AdamW).parameters
    for name in OWN:
        kind, default = str(signature[name].annotation), signature[name].default
        parts.append(section(name, kind, default, of_arguments[name]))
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--update", action="store_true", help="write docs/options.md")
    if parser.parse_args().update:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page(), end="")
