"""The decoder: `x_specs(cfg)` declares parameters, `x(params, inputs, cfg)` uses them.

Tensor names end in the letters of their dims (tests/model/test_names.py holds them true):

    B batch           D model width       E experts                    V vocabulary
    L position        N query heads       A a token's choices (top_k)  R layers of a scan
    M key position    K key/value heads   C slots of an expert         T flattened tokens
    H head width      G queries a kv head F feed-forward width         S all slots, E * C
    P expert groups   O experts a group   X all layers with experts    Y sources of text

    of multi-head latent attention: Q, J the latents' widths of queries and of keys and values;
    I, W the parts of a head's query and key without and with rotary positions; U its value.

A lower-case letter is a part: this shard's, or this chunk's.
"""
