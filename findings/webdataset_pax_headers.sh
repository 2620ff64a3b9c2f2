#!/usr/bin/env bash
# webdataset 1.0.2: TarWriter and ShardWriter give every member a second header of 1,024 bytes.
#
# They record the time of writing as a float, which tarfile can only keep in an extended (PAX) header before the member's
# own. So a member has 1,536 bytes of headers where tar needs 512. Shards of small images and of labels (one .cls file
# each) become twice as large. An integer as `mtime` is the way out; it is not the default, and 1.0 does not help.
# Readers see no difference.
# Seen, 1,000 samples of an image of 400 bytes and a class:
#   tarfile itself: 2058240 bytes
#   TarWriter: 4106240 bytes
#   TarWriter(mtime=1.0): 4106240 bytes
#   TarWriter(mtime=1): 2058240 bytes
# Touched: whoever packs small images for training or embedding; beit-jax reads both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check webdataset==1.0.2 numpy==2.4.6
cd "$folder"
venv/bin/python - <<'END'
import io
import os
import sys
import tarfile

import webdataset

image = b"x" * 400
with tarfile.open("plain.tar", "w") as tar:
    for number in range(1000):
        for ending, content in (("cls", b"1"), ("png", image)):
            member = tarfile.TarInfo(f"{number:06}.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
sizes = {"tarfile itself": os.path.getsize("plain.tar")}
for name, options in (("", {}), ("mtime=1.0", {"mtime": 1.0}), ("mtime=1", {"mtime": 1})):
    with webdataset.TarWriter("shard.tar", **options) as writer:
        for number in range(1000):
            writer.write({"__key__": f"{number:06}", "cls": 1, "png": image})
    sizes[f"TarWriter({name})" if name else "TarWriter"] = os.path.getsize("shard.tar")
for name, size in sizes.items():
    print(f"{name}: {size} bytes")
doubled = [size > 1.9 * sizes["tarfile itself"] for size in sizes.values()]
sys.exit(0 if doubled == [False, True, True, False] else 1)
END
