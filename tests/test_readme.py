"""Every command that the documentation prints takes its flags: those of READMEs and of the helps of modules."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

import search
import train_eval
from nas_kmix import __main__ as door
from nas_kmix.engine.cli import parse_flags

ROOT = Path(search.__file__).parent
PAGES = [
    ROOT / "README.md",
    *(path for place in ("studies", "benchmarks", "nas_kmix") for path in ROOT.glob(f"{place}/**/README.md")),
]
SCRIPTS = {"search.py": search.parse, "train_eval.py": train_eval.parse}
STARTS = re.compile(r"(?:python|torchrun .*?) (search\.py|train_eval\.py|-m nas_kmix[a-z_.]*)(?= |$)|(nas-kmix) ")


def parse(program, argv):
    """Raise, or end with 2, where the program does not take these flags."""
    if program in SCRIPTS:
        return SCRIPTS[program](argv)
    name = program.removeprefix("-m ")
    if name in ("nas-kmix", "nas_kmix"):
        name, *argv = (door.COMMANDS[argv[0]][0], *argv[1:])
    module = importlib.import_module(name)
    if hasattr(module, "parse"):
        return module.parse(argv)
    if name.endswith("report"):
        module = importlib.import_module(f"{name}.__main__")
    return parse_flags(module.Config, argv, None)


def printed():
    """Every command: where it stands, its program, and its flags."""
    texts = {path: "\n".join(re.findall(r"```bash\n(.*?)```", path.read_text(), re.DOTALL)) for path in PAGES}
    for path in (*ROOT.glob("*.py"), *ROOT.glob("nas_kmix/**/*.py")):
        head = path.read_text().split('"""')[1:2]
        texts[path] = "\n".join(re.findall(r"^    (\S.*)$", "".join(head), re.MULTILINE))
    for path, text in texts.items():
        for line in text.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                if (found := STARTS.search(part)) is not None:
                    yield pytest.param(
                        found[1] or found[2],
                        shlex.split(part[found.end() :], comments=True),
                        id=f"{path.relative_to(ROOT)}: {part.strip()}",
                    )


@pytest.mark.parametrize(("program", "argv"), list(printed()))
def test_a_printed_command_takes_its_flags(program, argv):
    parse(program, argv)
