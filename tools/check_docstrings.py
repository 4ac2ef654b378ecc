"""Runs pydoclint and leaves out what does not fit how docstrings are written here.

- DOC502 and DOC503 ask that "Raises" lists exactly what the body raises by name. Here it lists what reaches the caller,
  also from functions called and helpers that make the error. DOC501, an error raised without any "Raises", stays.
- pydoclint does not ask for "Args" and "Returns" in a docstring without sections. One whose only section is "Raises"
  is treated the same.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

RAISES_DIFFER = {"DOC502", "DOC503"}
SECTION_IS_MISSING = {"DOC101", "DOC103", "DOC201"}


def main(arguments: list[str]) -> int:
    """Run pydoclint with `arguments`, print what remains, and return 1 if anything does."""
    command = [sys.executable, "-I", "-X", "utf8", "-m", "pydoclint.main", "-sfn", "True", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", errors="replace", check=False)
    output = result.stdout + result.stderr
    findings = re.findall(r"^\s*(.+?):(\d+): (DOC\d+): (.*)$", output, flags=re.MULTILINE)
    if result.returncode != 0 and not findings:
        print(output)
        return result.returncode
    remaining = [
        f"{path}:{line}: {code}: {text}"
        for path, line, code, text in findings
        if code not in RAISES_DIFFER and not (code in SECTION_IS_MISSING and only_raises(path, int(line)))
    ]
    print("\n".join(remaining))
    return 1 if remaining else 0


def only_raises(path: str, line: int) -> bool:
    """Whether the docstring of the function that begins there has no section but "Raises"."""
    sections = re.findall(r"^(Args|Returns|Yields):$", docstrings(path).get(line, ""), flags=re.MULTILINE)
    return not sections


@lru_cache
def docstrings(path: str) -> dict[int, str]:
    """The docstrings of a file by the line of their function or of its first decorator."""
    tree = ast.parse(Path(path).read_text(encoding="utf-8"))
    found: dict[int, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
            found.update(dict.fromkeys(lines, ast.get_docstring(node) or ""))
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
