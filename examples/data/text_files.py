"""Text files of lines."""

import io
from pathlib import Path


def read_lines(path: Path) -> list[str]:
    """
    The lines of a UTF-8 file, without their ends, which are those of a text file alone: a line may hold the other
    characters that `str.splitlines` splits at, such as U+2028. A byte-order mark is no text.

    Raises:
        ValueError: if the file is not UTF-8, naming it and the line.
    """
    data = path.read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path} has to be UTF-8, but its line {line} is not: {error}.") from error
    return [line.removesuffix("\n") for line in io.StringIO(text, newline=None)]
