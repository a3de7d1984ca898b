"""`sparse-lab methods`: what conf/method offers, read from the files themselves."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from sparse_lab.config import conf_dir


def methods(user_conf: Path | None = None) -> list[dict[str, Any]]:
    """One dict a method: name, starts_from, parts, summary; a file's `defaults` are followed."""
    folders = [folder / "method" for folder in (conf_dir(), user_conf) if folder is not None]
    files = {path.stem: path for folder in folders for path in folder.glob("*.yaml")}
    rows = []
    for _, path in sorted(files.items()):
        config = _load(path, files)
        rows.append(
            {
                "name": path.stem,
                "starts_from": config.get("starts_from") or "-",
                "parts": ", ".join(_parts(config)) or "-",
                "summary": config.get("summary", ""),
            }
        )
    return rows


def _parts(config: dict[str, Any]) -> list[str]:
    """The surgery and the parts that a method has, each with its score or its two (what goes, what comes)."""
    named = [name for name in ("dyrelu", "sharing", "cyclic") if config.get(name)]
    for part in config.get("parts", []):
        chosen = config.get(part, {})
        scores = [str(chosen[key]) for key in ("score", "drop", "grow") if key in chosen]
        named.append(f"{part} ({', '.join(scores)})" if scores else part)
    return named


def _load(path: Path, files: dict[str, Path]) -> dict[str, Any]:
    config = OmegaConf.load(path)
    assert isinstance(config, DictConfig)
    bases = [base for base in config.pop("defaults", []) if isinstance(base, str) and base != "_self_"]
    merged = OmegaConf.merge(*(OmegaConf.create(_load(files[base], files)) for base in bases), config)
    plain = OmegaConf.to_container(merged)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def main(argv: list[str]) -> int:
    """Print the gallery as a table, or as Markdown for the README."""
    parser = argparse.ArgumentParser(prog="sparse-lab methods", description="The methods that method=NAME takes.")
    parser.add_argument("--markdown", action="store_true", help="a Markdown table")
    parser.add_argument(
        "--config-dir", type=Path, metavar="DIR", help="a folder of your own with method/NAME.yaml files"
    )
    args = parser.parse_args(argv)
    rows = methods(args.config_dir)
    if args.markdown:
        print("| method | starts from | parts (score) | what it does |\n| --- | --- | --- | --- |")
        for row in rows:
            print(f"| `{row['name']}` | {row['starts_from']} | {row['parts']} | {row['summary']} |")
        return 0
    from rich.console import Console
    from rich.table import Column, Table

    table = Table(Column("method", no_wrap=True), Column("starts from", no_wrap=True), "parts (score)", "what it does")
    for row in rows:
        table.add_row(row["name"], row["starts_from"], row["parts"], row["summary"])
    Console().print(table)
    return 0
