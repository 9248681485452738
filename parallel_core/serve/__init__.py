"""The engine behind HTTP: OpenAI's completions, Megatron's `PUT /api`, and the page and queries of PanGu-Alpha.

`service` runs the engine and hands out answers; `values` reads what clients send; `completions` and `others` are the
endpoints; `app` puts them together behind the limits; `command` is `python -m parallel_core.serve`.
"""
