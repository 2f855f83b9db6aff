"""Whole arms side by side: arms x ranks x budgets x seeds x domains, from one YAML file.

config: what a study is. data: its prompts and their three sides. tuning: the rule for learning
rates. plan: which cells are needed, given those that are done. execute: how a cell is done. run:
the loop. results, plots, page: what the finished cells say.
"""
