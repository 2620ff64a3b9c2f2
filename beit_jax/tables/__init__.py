"""Tables with a row for every image, in files of other programs' formats.

`features` is what every table of features gives, block by block; `reading` opens one of any format. `read_arrays` reads
NumPy's archives and safetensors, `read_arrow` Arrow and Parquet, `read_text` CSV and JSON lines. Written: `schema` says
what a table holds, `writing` which format a name has; `write_text`, `write_arrays` and `write_arrow` are the formats.
May import: the ground.
"""
