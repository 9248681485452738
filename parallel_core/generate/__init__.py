"""Text generation and scoring with a trained or converted model, on the training model's own layers.

`loading` makes a rank's part of the model of a checkpoint; `cache` and `stage` put keys and values that are kept under
its layers; `runner` runs tokens through them; `sampling` draws from logits that are cut over ranks; `engine` lets
sequences enter and leave the batch; `generator` is the call from Python and `score` what is asked of given text.
"""
