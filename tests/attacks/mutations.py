"""Random lies about a folder: the same for one seed, so that what is found can be found again."""

import json
import random

from folders import parts, put

INTEGERS = [
    -(1 << 70),
    -128,
    -1,
    0,
    1,
    2,
    3,
    4,
    8,
    16,
    31,
    32,
    33,
    64,
    96,
    128,
    1 << 16,
    1 << 26,
    1 << 31,
    1 << 40,
    1 << 63,
    1 << 70,
]
VALUES = [
    *INTEGERS,
    0.5,
    32.0,
    float("nan"),
    float("inf"),
    "4",
    "",
    "../x",
    "a\0b",
    None,
    True,
    False,
    [],
    {},
    [4],
    {"a": 4},
]


def places(node, path=()):
    """Paths to every value of a JSON tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield (*path, key)
        yield from places(child, (*path, key))


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


def change(rng, tree):
    """Replaces, removes, swaps or repeats a value of a JSON tree."""
    all_places = list(places(tree))
    if not all_places:
        return
    path = rng.choice(all_places)
    node, key = parent(tree, path), path[-1]
    how = rng.random()
    if how < 0.5:
        near = node[key] + rng.choice([-16, -1, 1, 16]) if type(node[key]) is int else rng.choice(VALUES)
        node[key] = rng.choice([near, rng.choice(VALUES)])
    elif how < 0.65:
        del node[key]
    elif how < 0.85:
        other = rng.choice(all_places)
        if other[: len(path)] != path and path[: len(other)] != other:
            there = parent(tree, other)
            node[key], there[other[-1]] = there[other[-1]], node[key]
    elif isinstance(node, dict):
        node[f"{key}{rng.choice(['x', '.weight', ''])}"] = node[key]


def header(rng, file):
    """Changes a safetensors file's header, or what it says of one quantized weight."""
    tree, data = parts(file)
    names = [name for name, text in tree.get("__metadata__", {}).items() if "RTNQuantizedTensor" in text]
    if names and rng.random() < 0.6:
        name = rng.choice(names)
        about = json.loads(tree["__metadata__"][name])
        change(rng, about)
        tree["__metadata__"][name] = json.dumps(about)
    else:
        change(rng, tree)
    put(file, tree, data)


def bytes_of(rng, file):
    content = bytearray(file.read_bytes())
    for _ in range(rng.choice([1, 1, 3, 10]) if content else 0):
        at = rng.randrange(len(content) if rng.random() < 0.5 else min(len(content), 3000))
        content[at] = rng.choice([rng.randrange(256), content[at] ^ 1 << rng.randrange(8), 0, 255, ord("9")])
    file.write_bytes(content)


def size_of(rng, file):
    content = file.read_bytes()
    at = rng.randrange(len(content) + 1)
    file.write_bytes(
        rng.choice([content[:at], content[at:], content + content[:at], content[:at] + content[at + 1 :]])
    )


def damage(folder, seed):
    """Damages a folder in one to three ways; gives the names of the files."""
    rng = random.Random(seed)
    touched = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        files = sorted(file for file in folder.iterdir() if file.is_file())
        file = rng.choice(
            [*files, *(file for file in files if file.suffix == ".safetensors" for _ in range(3))]
        )
        touched.append(file.name)
        how = rng.random()
        try:
            if how < 0.5 and file.suffix == ".safetensors":
                header(rng, file)
            elif how < 0.5:
                tree = json.loads(file.read_text())
                change(rng, tree)
                file.write_text(json.dumps(tree))
            elif how < 0.75:
                bytes_of(rng, file)
            elif how < 0.9:
                size_of(rng, file)
            elif how < 0.95:
                other = rng.choice(files)
                one, two = file.read_bytes(), other.read_bytes()
                file.write_bytes(two)
                other.write_bytes(one)
                touched.append(other.name)
            else:
                file.unlink()
        except (ValueError, KeyError, AttributeError, TypeError):
            # What was damaged before has no header to change any more.
            size_of(rng, file)
    return touched
