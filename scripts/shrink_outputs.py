#!/usr/bin/env python3
"""Make the pictures that notebooks store small enough for a repository: palettes in place of true colour.

    python scripts/shrink_outputs.py nbs/show/65_plots.ipynb ...

A notebook keeps what it showed, in fewer colours and bytes, until it has at most 150 kB. Run it after a notebook ran.
"""
import argparse
import base64
import io
import json
from pathlib import Path

from PIL import Image

LIMIT = 150_000  # bytes of a notebook
COLORS = 256, 128, 64, 32, 16


def text_of(notebook: dict) -> str:
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def shrunk(png: str, colors: int) -> str: # base64
    "The picture with a palette, if that is smaller."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    out = io.BytesIO()
    image.quantize(colors).save(out, "png", optimize=True)
    return min(png, base64.b64encode(out.getvalue()).decode(), key=len)


def shrink(path: Path) -> int: # bytes of the notebook afterwards
    "Rewrite one notebook. A picture that is stored twice, as PNG and JPEG, keeps the smaller one."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    shown = [o["data"] for c in notebook["cells"] for o in c.get("outputs", []) if "data" in o]
    pictures = [data for data in shown if "image/png" in data]
    for colors in COLORS:
        if len(text_of(notebook).encode()) <= LIMIT:
            break
        for data in pictures:
            data["image/png"] = shrunk(data["image/png"], colors)
            data.pop("image/jpeg", None)
    path.write_text(text_of(notebook), encoding="utf-8")
    return path.stat().st_size


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    for path in parser.parse_args().notebooks:
        print(f"{path}: {shrink(path):,} bytes")


if __name__ == "__main__":
    main()
