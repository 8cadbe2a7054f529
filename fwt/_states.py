"""What optax, torch and jaxpruner call the parts of the states of their optimizers, as a checkpoint
gives them back in dicts."""

# What a train state calls the state of its optimizer.
STATE_NAMES = {"opt_state", "opt_states", "optim_state", "optimizer_state"}
# Numbers of steps.
COUNTERS = {"count", "gradient_step", "mini_step", "num_steps", "step_count"}
# What stands in a state without a number of steps.
UNCOUNTED = {
    "e_g", "e_x", "learning_rate", "m", "m1", "m2", "mu", "n", "nu", "sum_of_squares", "trace", "v",
}  # fmt: skip
# Names that a layer may have too.
PLAIN = COUNTERS | {
    "adv_state", "avg_value", "b1", "barf", "best_value", "cache", "count_m2", "decrease_error",
    "e_g", "e_x", "ema", "ema_decay", "fast_state", "first_step", "found_nan", "g", "gamma", "grad",
    "hyperparams", "info", "init", "init_params", "inner_state", "inner_states", "key",
    "last_finite", "lb", "learning_rate", "m", "m1", "m2", "max_dist", "max_lr", "measurement",
    "measurements", "micro_step", "mu", "n", "nu", "opt_state", "params0", "projector", "r",
    "ready", "reward", "rng_key", "s", "scale", "skip_state", "step", "step_sizes", "subgradients",
    "sum_of_squares", "t", "trace", "update", "updates", "v", "v_col", "v_row", "value",
    "weight_sum", "x0", "z",
}  # fmt: skip
# Names that say by themselves what they are.
TELLING = {
    "acc_delta", "acc_grads", "avg_grad", "base_optimizer_state", "cooldown_count",
    "cumulative_gradients", "curvature_error", "diff_params_memory", "diff_updates_memory",
    "estim_dist", "estim_lr", "estim_sq_dist", "exp_avg", "exp_avg_sq", "exp_inf", "grad_acc",
    "grad_sum", "grad_sum_of_squares", "grad_sum_sq", "hessian_fn_state", "hyperparams_states",
    "init_particles", "inner_opt_state", "is_init_step", "is_initial_step", "max_exp_avg_sq",
    "mean_grads", "mean_grads_ema", "measure_states", "momentum_buffer", "notfinite_count",
    "ns_coeffs", "nu_max", "num_linesearch_steps", "numerator_weighted", "plateau_count",
    "prev_updates", "previous_gradient", "square_avg", "steps_since_sync", "sum_sq_diff_grads",
    "sum_sq_norm_grads", "target_sparsities", "total_notfinite", "variance_grads_ema",
    "weighted_sq_norm_grads", "weights_memory",
}  # fmt: skip
FIELDS = PLAIN | TELLING
# Parts that are no fields by themselves, beside those that tell what they are.
BESIDE = {"diff_params_memory": {"params"}, "target_sparsities": {"masks"}}
WRAPPERS = {"inner_state", "inner_states"}  # which optax.masked and multi_transform put around
OURS = {"count", "inner", "masks", "sparsity"}  # of fwt.optim.SparsifyState
