"""The commands of `dalle-ds`: each a module with `add_arguments(parser)` and `run(args)`, imported when called."""

# Name and summary; the module is the name with underscores.
COMMANDS = {
    "doctor": "say what works on this machine, and what to do where something does not",
    "make-scenes": "make a data set of captioned pictures, with a list of held-out combinations",
    "filter": "write clean shards, and a report of what each filter dropped",
    "index": "write the counts, places and checksums of shards beside them, so that reading can seek and check",
    "train-tokenizer": "train the caption tokenizer (byte-pair encoding)",
    "train-dvae": "stage 1: train the discrete VAE that turns pictures into tokens",
    "import-dvae": "make a run folder out of the released dVAE weights, or of exported ones",
    "export-dvae": "write a dVAE as state dicts that the released classes load",
    "encode-images": "turn pictures into token shards with a trained dVAE",
    "reconstruct": "send pictures through a trained dVAE, and show them side by side",
    "plan": "say on paper what a run takes: memory, bytes sent and time, for every way to shard it",
    "train-prior": "stage 2: train the transformer over text and image tokens",
    "halve-learning-rate": "ask a run to halve its learning rate, by hand",
    "export": "write a trained model as one file, with its settings and a model card",
    "import-model": "make a run folder of an exported model",
    "sample": "draw pictures for captions",
    "evaluate": "measure how well pictures match their captions, or what a dVAE keeps of them",
    "report": "write one HTML page of a run",
}
