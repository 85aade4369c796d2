"""The demo: `logitfuse demo` makes text and models on the spot and runs every stage on them.

`run` calls the stages; `make` makes the inputs, with `text`, `facts`, `tokenizers`, `training` and
`muon`. Nothing is downloaded. `demo.yaml` is a link to `examples/demo.yaml`, as the wheel has no
examples.
"""
