"""The AttentionRNN paper's tables, made anew: its experiments as data (`tables`), as runs of a
sweep with an estimate of their time (`plan`), and its numbers beside ours, from result files alone
(`report`, `curves`)."""
