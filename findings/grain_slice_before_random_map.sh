#!/usr/bin/env bash
# grain 0.2.18: a MapDataset that is sharded before random_map gives every host the same random numbers.
#
# The generator that random_map hands out belongs to an element's position in the data set it is applied to. After the
# slice ds[host::hosts] the positions begin at 0 on each host, so that the first image of every host is cropped and
# flipped alike, and the second, for the whole training. Slicing first is what saves work and what one writes; with
# the slice last the draws differ. Both are valid, deterministic and give different images, and no loss curve shows
# it.
# Seen, the numbers that two hosts drew:
#   slice, then random_map: [926, 268, 599, 855] and [926, 268, 599, 855]
#   random_map, then slice: [822, 239, 970, 419] and [869, 787, 384, 189]
# Touched: whoever augments on several hosts; beit-jax slices last.
set -euo pipefail
PYTHON=${PYTHON:-python3.13}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"$PYTHON" -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q --disable-pip-version-check grain==0.2.18 numpy==2.5.5
"$folder/venv/bin/python" - <<'END'
import sys

import grain


class Draw(grain.transforms.RandomMap):
    def random_map(self, element, generator):
        return int(generator.integers(1000))


def drawn(host, slice_first):
    elements = grain.MapDataset.range(8).seed(0)
    if slice_first:
        return list(elements[host::2].random_map(Draw()))
    return list(elements.random_map(Draw())[host::2])


alike = []
for slice_first, name in ((True, "slice, then random_map"), (False, "random_map, then slice")):
    hosts = [drawn(host, slice_first) for host in range(2)]
    alike.append(hosts[0] == hosts[1])
    print(f"{name}: {hosts[0]} and {hosts[1]}")
sys.exit(0 if alike == [True, False] else 1)
END
