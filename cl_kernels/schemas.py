"""The schema of every operation, in one place.

A schema is registered twice: in the namespace ``cl_kernels`` for the compiled library (CPU and CUDA keys, see csrc/ops.cpp) and in
``cl_kernels_triton`` for the Triton kernels, so that both can be present and chosen call by call. Outputs never alias inputs.
"""

from __future__ import annotations

SCHEMAS = {
    # x (B, L, D), expert_ids (B, k) int64, gates (B, k) fp32/fp64, seed () or (2,) int64, best on x's device -> out (B, L, D),
    # hidden (B, k, L, R): the bottleneck activation after ReLU and dropout, which is all that the backward pass needs (zero
    # elements unless saved).
    "moe_adapter": (
        "(Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor down_bias, Tensor up_weight, Tensor up_bias, "
        "Tensor? residual, Tensor? seed, float scale, float dropout_p, bool save_hidden) -> (Tensor out, Tensor hidden)"
    ),
    # Gradients that are not needed come back with zero elements.
    "moe_adapter_backward": (
        "(Tensor grad, Tensor x, Tensor expert_ids, Tensor gates, Tensor down_weight, Tensor up_weight, Tensor up_bias, "
        "Tensor hidden, float scale, float dropout_p, bool need_x, bool need_gates, bool need_experts) -> "
        "(Tensor grad_x, Tensor grad_gates, Tensor grad_down_weight, Tensor grad_down_bias, "
        "Tensor grad_up_weight, Tensor grad_up_bias)"
    ),
    # Of the compiled library alone: (residual + x) + the mixture chosen by token 0, x and residual (B, L, D), w_gate and w_noise
    # (D, E), noise (B, E), all float32 or float64; lists of E tensors (R, D), (R,), (D, R), (D,); seed as above -> out (B, L, D),
    # usage (E,) int64, gates and expert_ids (B, k), hidden (B, k, L, R).
    "routed_block": (
        "(Tensor x, Tensor residual, Tensor w_gate, Tensor w_noise, Tensor noise, Tensor[] down_weight, Tensor[] down_bias, "
        "Tensor[] up_weight, Tensor[] up_bias, Tensor? seed, int k, float scale, float dropout_p, bool save_hidden) -> "
        "(Tensor out, Tensor usage, Tensor gates, Tensor expert_ids, Tensor hidden)"
    ),
    # Those of the experts stacked; what is not needed comes back with zero elements.
    "routed_block_backward": (
        "(Tensor grad, Tensor x, Tensor w_gate, Tensor w_noise, Tensor noise, Tensor gates, Tensor expert_ids, "
        "Tensor[] down_weight, Tensor[] up_weight, Tensor[] up_bias, Tensor hidden, float scale, float dropout_p, bool need_x, "
        "bool need_router, bool need_experts) -> (Tensor grad_x, Tensor grad_gate, Tensor grad_noise, "
        "Tensor grad_down_weight, Tensor grad_down_bias, Tensor grad_up_weight, Tensor grad_up_bias)"
    ),
    # student, teacher (outer, M, inner), softmax over M -> loss (outer, inner), stats (4, outer, inner): maximum and log-sum of
    # the exponentials from it, of the student's and the teacher's logits over temperature. Two numbers, because with large
    # logits their sum would round away the probabilities' digits.
    "distill_kl": "(Tensor student, Tensor teacher, float temperature, bool kl) -> (Tensor loss, Tensor stats)",
    "distill_kl_backward": "(Tensor grad, Tensor student, Tensor teacher, Tensor stats, float temperature) -> Tensor",
    # The same, but its backward pass writes the gradient over the student, which is contiguous.
    "distill_kl_overwriting": "(Tensor student, Tensor teacher, float temperature, bool kl) -> (Tensor loss, Tensor stats)",
    "distill_kl_backward_": (
        "(Tensor grad, Tensor(a!) student, Tensor teacher, Tensor stats, float temperature) -> ()"
    ),
    # Of the compiled library alone: the mean of distill_kl along dimension 1 of teacher and student (N, M, …), of one dtype
    # -> loss () in that dtype, stats (4, N · …). Gradients that are not needed come back with zero elements.
    "distillation": "(Tensor teacher, Tensor student, float temperature) -> (Tensor loss, Tensor stats)",
    "distillation_backward": (
        "(Tensor grad, Tensor teacher, Tensor student, Tensor stats, float temperature, bool need_teacher, bool need_student) -> "
        "(Tensor grad_teacher, Tensor grad_student)"
    ),
    # student (N, d), teacher (K, N, d_t), anchors (M, d), teacher_anchors (M, d_t), weight (K, N) fp32/fp64, logit_scale () times
    # factor -> loss (), row_stats (1 + K, N): log-sum-exps over the anchors of student and teachers, column_stats (2 + K, M):
    # log-sum-exp over the rows of the student, weighted sum of the teachers' probabilities, log-sum-exps of the teachers.
    # The statistics of a direction whose factor is 0 have no columns. With need_student or need_anchors the CPU kernels return,
    # instead of statistics, gradients (N, d) and (M, d) in fp32/fp64: those of the loss with respect to logit_scale · student and
    # logit_scale · anchors; otherwise these have zero elements. The Triton kernels ignore both.
    "feature_distill_kl": (
        "(Tensor student, Tensor teacher, Tensor anchors, Tensor? teacher_anchors, Tensor? weight, Tensor? logit_scale, "
        "float factor, float temperature, float rows, float columns, bool kl, bool mask_diagonal, "
        "bool need_student=False, bool need_anchors=False) "
        "-> (Tensor loss, Tensor row_stats, Tensor column_stats, Tensor student_gradient, Tensor anchors_gradient)"
    ),
    # Gradients that are not needed come back with zero elements; that of logit_scale in fp32/fp64.
    "feature_distill_kl_backward": (
        "(Tensor grad, Tensor student, Tensor teacher, Tensor anchors, Tensor? teacher_anchors, Tensor? weight, "
        "Tensor? logit_scale, Tensor row_stats, Tensor column_stats, float factor, float temperature, float rows, "
        "float columns, bool mask_diagonal, bool need_student, bool need_anchors, bool need_scale) "
        "-> (Tensor grad_student, Tensor grad_anchors, Tensor grad_scale)"
    ),
    # gates (B, k) fp32 (fp64 for fp64 x), expert_ids (B, k) and usage (E,) int64. Its gradient needs no kernel of its own.
    "top_k_gating": (
        "(Tensor x, Tensor w_gate, Tensor? w_noise, Tensor? noise, int k) -> (Tensor gates, Tensor expert_ids, Tensor usage)"
    ),
    # Of the Triton kernels alone; gradients that are not needed come back with zero elements.
    "top_k_gating_backward": (
        "(Tensor grad, Tensor x, Tensor w_gate, Tensor? w_noise, Tensor? noise, Tensor gates, Tensor expert_ids, bool need_x, "
        "bool need_gate, bool need_noise) -> (Tensor grad_x, Tensor grad_gate, Tensor grad_noise)"
    ),
    # Of the compiled library alone: Σ ‖tensor − reference‖² over lists of contiguous float32 or float64 tensors, and its gradient.
    "squared_distance": "(Tensor[] tensors, Tensor[] references) -> Tensor",
    "squared_distance_backward": "(Tensor grad, Tensor[] tensors, Tensor[] references) -> Tensor[]",
    # The same with a weight for every scalar, Σ w (t − r)²; and gradients += factor · w (t − r), in place, w = 1 without weights.
    "weighted_squared_distance": "(Tensor[] tensors, Tensor[] references, Tensor[] weights) -> Tensor",
    "add_difference_": (
        "(Tensor(a!)[] gradients, Tensor[] tensors, Tensor[] references, Tensor[] weights, float factor) -> ()"
    ),
    # Contiguous tensors; others as many as averages or none. A seed rounds 16-bit averages stochastically.
    "average_": (
        "(Tensor(a!)[] averages, Tensor[] values, float weight, Tensor[] others, float other_weight, int? seed) -> ()"
    ),
}
