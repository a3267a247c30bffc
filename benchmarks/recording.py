"""Records a command as its terminal shows it, at its own speed: benchmarks/results/recording.gif.

python -m uv run benchmarks/recording.py
"""

import fcntl
import itertools
import os
import pty
import re
import shlex
import struct
import sys
import tempfile
import termios
import time
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import tyro
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSansMono.ttf")


@dataclass
class Options:
    command: str = "ppo.py --env-id CartPole-v1"  # a script and its flags
    columns: int = 110  # width of the terminal
    file: Path = ROOT / "benchmarks" / "results" / "recording.gif"  # where to write


def record(options: Options) -> list[tuple[float, str]]:
    """What a command printed so far, and the seconds since its start, at each change."""
    script, *flags = shlex.split(options.command)
    states, start = [(0.0, "")], time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        child, terminal = pty.fork()
        if child == 0:
            os.chdir(folder)
            size = struct.pack("HHHH", 24, options.columns, 0, 0)
            fcntl.ioctl(0, termios.TIOCSWINSZ, size)
            os.execv(sys.executable, [sys.executable, str(ROOT / script), *flags])
        while True:
            try:
                text = os.read(terminal, 10_000).decode()
            except OSError:  # the terminal's end
                break
            states.append((time.perf_counter() - start, states[-1][1] + text))
        if status := os.waitpid(child, 0)[1]:
            raise SystemExit(f"--command {options.command}: status {status}\n{states[-1][1]}")
    return states


def screen(text: str, columns: int) -> list[str]:
    """The lines that a terminal shows: of what is written over itself, the last."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace("\r\n", "\n")
    lines = [[part for part in line.split("\r") if part][-1:] for line in text.split("\n")]
    shown = ["".join(line).rstrip() for line in lines]
    return [row for line in shown for row in re.findall(f".{{1,{columns}}}", line) or [""]]


def draw(lines: list[str], rows: int, columns: int) -> Image.Image:
    font = ImageFont.truetype(FONT, 15)
    width, height = round(font.getlength("m" * columns)) + 24, rows * 21 + 24
    image = Image.new("P", (width, height), 0)
    image.putpalette([24, 26, 31, 220, 223, 228, 126, 200, 120])
    pen = ImageDraw.Draw(image)
    for row, line in enumerate(lines):
        pen.text((12, 12 + row * 21), line, fill=2 if line.startswith("$ ") else 1, font=font)
    return image


def main(options: Options) -> None:
    states, prompt = record(options), f"$ python {options.command}\n"
    texts = [(when, screen(prompt + text, options.columns)) for when, text in states]
    rows = max(len(lines) for _, lines in texts)
    frames = [draw(lines, rows, options.columns) for _, lines in texts]
    times = [when for when, _ in texts] + [texts[-1][0] + 4]
    durations = [max(20, round(1000 * (b - a))) for a, b in itertools.pairwise(times)]
    first, *others = frames
    first.save(options.file, save_all=True, append_images=others, duration=durations, loop=0)
    print(f"{options.file}: {len(frames)} frames, {times[-2]:.1f} s")


if __name__ == "__main__":
    main(tyro.cli(Options))
