"""Products of weight rows with token activations, one kernel per block format.

Each has the C signature of 12 int64

    (weights, row_bytes, rows, columns, activations, activation_bytes, in_index,
     out, out_bytes, out_index, tokens, scratch)

and computes out[o(t)][r] = weights[r] . activations[i(t)] for r < rows, t < tokens, where i and o
read int32 row numbers from in_index and out_index, or are the identity where the address is 0.
`scratch` is the calling thread's own; `scratch_bytes` says how much is needed.

The value of an output is computed in the same order whatever rows and tokens are computed beside
it, so batches of any width agree bit for bit.
"""
