"""Prints the oldest versions that pyproject.toml promises, as constraints for pip: `make test-oldest` installs them.

Left out are torch, whose build depends on the machine, and the tools of the extra `dev`.
"""

from pathlib import Path

import tomllib
from packaging.requirements import Requirement

EXTRAS = ("recipes", "rewards", "judge", "peft", "trl")


def main() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *(project["optional-dependencies"][extra] for extra in EXTRAS)]
    for requirement in {Requirement(line) for group in groups for line in group}:
        lower = [bound.version for bound in requirement.specifier if bound.operator == ">="]
        if requirement.name != "torch" and lower:
            print(f"{requirement.name}=={lower[0]}")


if __name__ == "__main__":
    main()
