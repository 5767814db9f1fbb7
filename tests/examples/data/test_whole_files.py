import os

import pytest

from data.whole_files import flush


@pytest.fixture
def as_on_windows(monkeypatch):
    """Windows opens no folders, and flushes nothing that is open for reading alone; here it flushes what is named."""
    fcntl = pytest.importorskip("fcntl")
    flushed = []
    open_file = os.open

    def open_no_folder(path, flags, *others, **more):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", str(path))
        return open_file(path, flags, *others, **more)

    def flush_what_is_written(descriptor):
        if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        flushed.append(os.readlink(f"/proc/self/fd/{descriptor}"))

    monkeypatch.setattr(os, "open", open_no_folder)
    monkeypatch.setattr(os, "fsync", flush_what_is_written)
    return flushed


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks up descriptors in /proc")
def test_files_are_flushed_and_folders_left_on_windows(as_on_windows, tmp_path):
    (tmp_path / "file").write_text("text", encoding="utf-8")
    flush(tmp_path)
    flush(tmp_path / "file")
    assert as_on_windows == [str(tmp_path / "file")]
    with pytest.raises(FileNotFoundError):
        flush(tmp_path / "absent")
