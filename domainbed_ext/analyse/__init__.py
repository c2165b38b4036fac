"""The analyses of Zhu et al. 2024 and of LoRA-FA, on the runs of a sweep: `python -m domainbed_ext.analyse NAME`.

similarity   how similar the learned A's of different runs are, and the learned B's
lemmas       what the best B for a random A, and the best A for a random B, leave of a full fine-tuning's change
inits        accuracy by the start of A and B, and the distribution of A before and after training
energy       spectra of the updates, and what lies in the span of a factor
analysis     what an analysis declares about itself
registry     all analyses
stored       their results in a sweep's folder, for tables, plots and page
runs         the sweep's selected runs, and their factors and weights
moments      the second moments of layers' inputs
matrices     the linear algebra, in float64
averages     means and intervals
tables       cells and rows that several analyses share
plots        panels and legends that several analyses share
command      the command line
"""
