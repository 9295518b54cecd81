"""What lies in a folder, to compare with later."""

import os


def tree(folder):
    """Every path below, with a file's content and a link's target."""
    return {
        str(path.relative_to(folder)): os.readlink(path)
        if path.is_symlink()
        else path.read_bytes()
        if path.is_file()
        else None
        for path in sorted(folder.rglob("*"))
    }
