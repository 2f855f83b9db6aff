"""Whole arms side by side: arms x ranks x budgets x seeds x domains, from one YAML file.

config: what a study is. data: its prompts and their three splits. plan: which tasks are needed,
given those that are done, and the rule for learning rates. ledger: results of tasks. execute: how
a task is done. estimate: the time that is left. run: the loop. figures, study: what the finished
tasks say. tables, plots, page: how it is shown.
"""
