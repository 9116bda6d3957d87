"""What `finetune_clm.py` and `compare.py` share.

args         command-line flags, as dataclasses
errors       ScriptError and the exit status
arms         the norms a script knows, as one table, and `NAME[:strategy][:p]`
baselines    the paper's "no norm" and "L2 norm", for training from scratch
launch       Accelerator, and what accelerate launch asked for
models       config, tokenizer, model; checks on them
data         text to token blocks, split, order
training     the loop
checkpoints  save and resume in mid-run
evaluation   loss, perplexity, token accuracy
throughput   tokens/s of several arms, interleaved
results      JSON files, quantiles, environment
report       Markdown
plots        PNG
"""
