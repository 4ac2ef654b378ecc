"""Where the code comes from: permissively licensed packages of PyPI, pinned by version and digest.

A package is fetched as a pure-Python wheel and read as a zip file: nothing is installed or imported. Its licence is
read from the wheel's own metadata, again on every run. Left out: tests, vendored copies, generated files, migrations,
and files too large to be edited in one go.

Not covered: a licence that one file of a package has and its metadata does not say.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from email.parser import Parser
from pathlib import Path, PurePosixPath

from engine.errors import PathError, UsageError

PACKAGES = Path(__file__).with_name("packages.json")
# Measured with, or kept for measuring: never learnt from.
FORBIDDEN = {
    "boltons",
    "cachetools",
    "cytoolz",
    "humanize",
    "inflection",
    "more-itertools",
    "python-slugify",
    "sqlparse",
    "toolz",
}
_PERMISSIVE = re.compile(r"\b(?:MIT|BSD|0BSD|Apache|ISC|ISCL|PSF|Python Software Foundation|Expat)\b", re.IGNORECASE)
_COPYLEFT = re.compile(r"\b[AL]?GPL|General Public|\bMPL|Mozilla|\bEPL|\bCDDL|\bEUPL|CC-BY|Proprietary", re.IGNORECASE)
_LEFT_OUT_FOLDER = re.compile(
    r"(?:_|\b)(?:vendor(?:ed)?|extern(?:als?)?|third_?party|thirdparty|packages|tests?|testing|unittests?|migrations|"
    r"locales?|lang|data|examples?|docs?|benchmarks?|templates?)\b"
)
_LEFT_OUT_FILE = re.compile(r"(?:test_.*|.*_test|conftest|.*_pb2.*|.*tab|six|_?version|setup|__main__)\.py")
_GENERATED = re.compile(r"(?i)(?:auto-?|automatically )?generated (?:by|from|with|using)|do not edit")
_MIN_FILE_BYTES, _MAX_FILE_BYTES = 400, 12_000


@dataclass(frozen=True, slots=True)
class Package:
    """One pinned package.

    Args:
        name: Its name on PyPI.
        version: The version.
        wheel: File name of the wheel.
        sha256: Digest of the wheel.
        licence: What its metadata says.
    """

    name: str
    version: str
    wheel: str
    sha256: str
    licence: str


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a package.

    Args:
        package: Name of the package.
        path: Its path in the wheel.
        text: The whole file.
    """

    package: str
    path: str
    text: str


def read_packages(path: Path = PACKAGES) -> list[Package]:
    """The pinned packages.

    Args:
        path: A JSON file with `packages`.

    Returns:
        The packages, in order.

    Raises:
        PathError: The file cannot be read.
        UsageError: It is malformed, or names a package that is never learnt from.
    """
    try:
        packages = [Package(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["packages"]]
    except OSError as error:
        raise PathError(f"{path} cannot be read: {error.strerror or error}", hint="Check the path.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is no list of packages: {error}", hint="Compare it with packages.json.") from None
    for package in packages:
        _check_allowed(package.name)
    return packages


def pin(folder: Path) -> tuple[list[Package], dict[str, str]]:
    """Packages of the wheels in a folder.

    Args:
        folder: Holds wheels.

    Returns:
        The packages, and why other wheels were left out.
    """
    packages: list[Package] = []
    refused: dict[str, str] = {}
    for path in sorted(folder.glob("*.whl")):
        name, version, licence = _facts(path)
        if name in FORBIDDEN:
            refused[name] = "never learnt from"
        elif not is_permissive(licence):
            refused[name] = f"licence: {licence or 'not said'}"
        else:
            packages.append(Package(name, version, path.name, _sha256(path), licence))
    return packages, refused


def write_packages(packages: Sequence[Package], path: Path) -> None:
    """Write a list that `read_packages` reads.

    Args:
        packages: The packages.
        path: The file.
    """
    entries = [asdict(package) for package in packages]
    path.write_text(json.dumps({"packages": entries}, indent=1) + "\n", encoding="utf-8")


def fetch(packages: Sequence[Package], folder: Path) -> None:
    """Bring the wheels of packages into a folder; those that are there are kept, and every digest is checked.

    Args:
        packages: What to fetch.
        folder: Where wheels lie.

    Raises:
        PathError: A wheel cannot be fetched, or is another one than was pinned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = [f"{package.name}=={package.version}" for package in packages if not (folder / package.wheel).is_file()]
    if missing:
        command = [sys.executable, "-I", "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        pure = ["--platform", "any", "--implementation", "py", "--abi", "none", "--python-version", "3.12"]
        done = subprocess.run([*command, *pure, "--dest", str(folder), *missing], capture_output=True, text=True)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
            raise PathError(f"{len(missing)} packages cannot be fetched: {last}", hint="Check the connection to PyPI.")
    for package in packages:
        path = folder / package.wheel
        if not path.is_file() or _sha256(path) != package.sha256:
            raise PathError(f"{path} is not the wheel that was pinned", hint="Delete it and fetch it again.")
        if not is_permissive(_facts(path)[2]):
            raise PathError(f"{path} does not say a permissive licence", hint="Take it out of the list of packages.")


def is_permissive(licence: str) -> bool:
    """Whether a licence lets us learn from the code and asks for no more than to be named.

    Args:
        licence: As the package's metadata has it.

    Returns:
        True for MIT, BSD, Apache, ISC and PSF without a copyleft licence beside them.
    """
    return bool(_PERMISSIVE.search(licence)) and not _COPYLEFT.search(licence)


def read_files(wheel: Path, package: str) -> Iterator[SourceFile]:
    """The files of a wheel that are written by hand, not tests, and of a size that can be edited.

    Args:
        wheel: The wheel.
        package: Name of the package.

    Yields:
        The files, in the order of their paths.
    """
    with zipfile.ZipFile(wheel) as archive:
        for info in sorted(archive.infolist(), key=lambda info: info.filename):
            path = PurePosixPath(info.filename)
            if not (_MIN_FILE_BYTES <= info.file_size <= _MAX_FILE_BYTES) or not _is_wanted(path):
                continue
            try:
                text = archive.read(info).decode("utf-8")
            except UnicodeDecodeError:
                continue
            if not _GENERATED.search(text[:1000]) and "\r" not in text and "\t" not in text:
                yield SourceFile(package, info.filename, text)


def _is_wanted(path: PurePosixPath) -> bool:
    folders = path.parts[:-1]
    return (
        path.suffix == ".py"
        and not any(_LEFT_OUT_FOLDER.fullmatch(folder.lower()) for folder in folders)
        and not any(folder.replace("_", "-").lower() in FORBIDDEN for folder in (*folders, path.stem))
        and not _LEFT_OUT_FILE.fullmatch(path.name)
    )


def _check_allowed(name: str) -> None:
    if name.lower().replace("_", "-") in FORBIDDEN:
        raise UsageError(f"{name} is kept for measuring", hint="Take it out of the list of packages.")


def _facts(path: Path) -> tuple[str, str, str]:
    """Name, version and licence of a wheel."""
    with zipfile.ZipFile(path) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
        head = Parser().parsestr(archive.read(name).decode("utf-8", "replace"), headersonly=True)
    classifiers = [value.rpartition("::")[2].strip() for value in head.get_all("Classifier", []) if "License" in value]
    licence = head.get("License-Expression") or " AND ".join(classifiers)
    if not licence or licence == "OSI Approved":
        licence = (head.get("License") or "").strip().split("\n")[0][:80]
    return str(head["Name"]).lower().replace("_", "-"), str(head["Version"]), licence


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
