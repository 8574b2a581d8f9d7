"""The gallery: our own code with one mistake each, of the kind that runs without an error and trains a wrong model.

Read it from top to bottom, beside the file that is changed. `old` is the source text, which occurs once in the file;
`new` is the same place with the mistake. docs/mistakes.md says what the curves of a DPO run show.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mistake:
    """One mistake: where it is, what it does, and the test that catches it."""

    name: str
    file: str  # from the root of the repository
    old: str
    new: str
    what: str  # what is wrong, or how one comes to write it
    test: str  # the pytest node id of a test that fails because of it
    trained: bool = True  # whether `--curves` trains with it: only if it can change a DPO run from an SFT model
    flags: tuple = ()  # flags of train_dpo.py, if the mistake shows only with them
    resumed: bool = False  # whether the run is stopped half-way and resumed
    shows: str = "rewards/accuracies"  # the metric to draw below the margins


# fmt: off
GALLERY = [
    # ---- the loss ----
    Mistake("log-ratios-added", "train_dpo.py", shows="loss",
        old="    h = chosen_log_ratios - rejected_log_ratios",
        new="    h = chosen_log_ratios + rejected_log_ratios",
        what="The two log-ratios are added. A sign is easily lost when the four log-probabilities are regrouped.",
        test="tests/test_loss.py::test_policy_minus_reference_not_the_reverse"),
    Mistake("chosen-and-rejected-swapped", "minidpo/dataset.py",
        old="    return PreferenceBatch(chosen, rejected)",
        new="    return PreferenceBatch(rejected, chosen)",
        what="The two sides change places in the batch, for instance because a dataset lists its worse response first.",
        test="tests/test_data.py::test_preference_batch_scores_both_sides_as_they_stand"),
    Mistake("reference-added", "train_dpo.py", shows="rewards/chosen",
        old="""\
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps""",
        new="""\
    chosen_log_ratios = policy_chosen_logps + reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps + reference_rejected_logps""",
        what="log pi + log pi_ref instead of log pi - log pi_ref: a sign is easily lost with all four in one line.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2"),
    Mistake("beta-inverted", "train_dpo.py", flags=("--beta", "0.1"), shows="loss",
        old="    h = chosen_log_ratios - rejected_log_ratios",
        new="""\
    beta = 1 / beta
    h = chosen_log_ratios - rejected_log_ratios""",
        what="Division by beta instead of multiplication, from reading beta as a temperature. (At beta 1 the two are "
             "the same, so this run has the paper's 0.1.)",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference"),
    Mistake("beta-missing-from-the-rewards", "train_dpo.py", shows="loss",
        old="    return losses, (beta * chosen_log_ratios).detach(), (beta * rejected_log_ratios).detach()",
        new="    return losses, chosen_log_ratios.detach(), rejected_log_ratios.detach()",
        what="Beta is in the loss only: the log-ratios are logged as rewards without it.",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference"),
    Mistake("no-log-sigmoid", "train_dpo.py", shows="loss",
        old="        losses = -F.logsigmoid(margins)  # (7)",
        new="        losses = -margins  # (7)",
        what="The margin itself is maximised, as if the log-sigmoid around it changed nothing.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2"),
    Mistake("log-of-sigmoid", "train_dpo.py", shows="loss",
        old="        losses = -F.logsigmoid(margins)  # (7)",
        new="        losses = -torch.log(torch.sigmoid(margins))  # (7)",
        what="The formula of the paper in two calls. In fp32, sigmoid(-104) is 0 and its logarithm is minus infinity.",
        test="tests/test_loss.py::test_margins_of_a_thousand_stay_finite"),
    Mistake("robust-for-conservative", "train_dpo.py", flags=("--label-smoothing", "0.1"), shows="loss",
        old="            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)",
        new="""\
            losses = (1 - label_smoothing) * losses + label_smoothing * F.logsigmoid(-margins)
            losses = losses / (1 - 2 * label_smoothing)""",
        what="Two losses are called label smoothing. Conservative DPO adds the loss of the flipped label; robust DPO "
             "subtracts it and divides by 1 - 2e.",
        test="tests/test_loss.py::test_trap20_label_smoothing_is_conservative_dpo_by_hand"),
    Mistake("ipo-with-beta-in-the-margin", "train_dpo.py", flags=("--loss-type", "ipo"), shows="loss",
        old="        losses = (h - 1 / (2 * beta)) ** 2",
        new="        losses = (margins - 1 / (2 * beta)) ** 2",
        what="IPO's target, 1 / (2 beta), belongs to h. Here it is compared with the margin, which contains beta.",
        test="tests/test_loss.py::test_ipo_by_hand"),
    # ---- log-probabilities ----
    Mistake("mean-over-tokens", "train_dpo.py", shows="logps/chosen",
        old="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1))",
        new="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1) / side.mask.sum(dim=-1))",
        what="The mean over the response instead of the sum: it divides beta by the length of each response.",
        test="tests/test_loss.py::test_trap01_response_logps_are_sums_over_the_response"),
    Mistake("mask-left-out", "train_dpo.py", shows="logps/chosen",
        old="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1))",
        new="        sums.append(logps.sum(dim=-1))",
        what="`masked_fill` is left out: the log-probabilities of prompt and padding are summed too.",
        test="tests/test_loss.py::test_trap01_response_logps_are_sums_over_the_response"),
    Mistake("softmax-over-positions", "train_dpo.py", shows="logps/chosen",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = F.log_softmax(logits, dim=1)",
        what="Normalised over the positions, not over the vocabulary: dim=1 would be right for logits of shape (B, V).",
        test="tests/test_loss.py::test_token_logps_by_loop"),
    Mistake("raw-logits", "train_dpo.py", shows="logps/chosen",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = logits",
        what="The log-softmax is left out, and logits are summed as if they were log-probabilities.",
        test="tests/test_loss.py::test_token_logps_by_loop"),
    Mistake("log-softmax-in-bf16", "train_dpo.py",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = F.log_softmax(logits.bfloat16(), dim=-1).float()",
        what="The log-softmax is computed in bf16, as in a model that was cast to bf16 as a whole. The steps of bf16 "
             "are 0.25 at -40 nats and 2 at -300.",
        test="tests/test_loss.py::test_trap06_long_responses_of_shifted_logits"),
    Mistake("rejected-detached", "train_dpo.py", shows="rewards/chosen",
        old="    return sums[0], sums[1]",
        new="    return sums[0], sums[1].detach()",
        what="The gradient of one side is cut, for instance by a torch.no_grad() that was meant for the reference.",
        test="tests/test_loss.py::test_both_sides_get_their_gradient"),
    # ---- rows, targets, masks ----
    Mistake("merge-across-the-border", "minidpo/dataset.py", trained=False,
        old="        prompt, *responses = (tokenizer.encode(record[field]) for field in fields)",
        new="""\
        prompt = tokenizer.encode(record["prompt"])
        responses = [tokenizer.encode(record["prompt"] + record[side])[len(prompt) :] for side in fields[1:]]""",
        what="Prompt and response are encoded as one text and cut at the length of the prompt. But a BPE merge can "
             "cross the border, and then the cut removes the first part of the response.",
        test="tests/test_data.py::test_trap02_no_merge_crosses_the_border"),
    Mistake("no-end-of-response", "minidpo/dataset.py", shows="logps/chosen",
        old="[r[:room] if len(r) > room else r + [eot] if e else r for r, e in zip(responses, ended, strict=True)]",
        new="[r[:room] for r in responses]",
        what="The eot after the response is left out: the texts look complete without it.",
        test="tests/test_loss.py::test_trap03_the_final_eot_counts"),
    Mistake("targets-not-shifted", "minidpo/dataset.py", shows="logps/chosen",
        old="        targets[i, :n] = row[1:]",
        new="        targets[i, :n] = row[:-1]",
        what="The target of a position is its own token. Some libraries shift inside the model; ours does not.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike"),
    Mistake("mask-off-by-one", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) : n] = True",
        what="The targets are shifted by one and the mask is not: the first token of the response is never scored.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike"),
    Mistake("mask-by-id", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) - 1 : n] = row[len(prompt) :] != prompt[0]",
        what="Every token with the id of eot is taken for padding, since GPT-2 has no padding token of its own. The "
             "eot at the end of the response is then masked too.",
        test="tests/test_data.py::test_trap04_eot_padding_and_text_may_share_an_id"),
    Mistake("prompt-scored", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, :n] = True",
        what="The mask covers the prompt too, as in pretraining.",
        test="tests/test_data.py::test_trap03_the_scored_targets_are_the_response_to_its_eot"),
    Mistake("padding-scored", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) - 1 :] = True",
        what="The mask runs to the end of the tensor instead of the end of the row.",
        test="tests/test_data.py::test_trap12_company_adds_padding_and_nothing_else"),
    Mistake("left-padding", "minidpo/dataset.py", shows="loss",
        old="""\
        ids[i, :n] = row[:-1]
        targets[i, :n] = row[1:]
        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token""",
        new="""\
        ids[i, T - n :] = row[:-1]
        targets[i, T - n :] = row[1:]
        mask[i, T - n + len(prompt) - 1 :] = True""",
        what="Rows are padded on the left, as sampling needs them, but without the positions and the attention mask "
             "that belong to it. The numbers of a row then depend on the longest row of its batch.",
        test="tests/test_loss.py::test_trap12_padding_and_company_change_nothing"),
    # ---- policy, reference, model ----
    Mistake("dropout-missed-in-attention", "minidpo/model.py", trained=False,
        old="""\

            elif isinstance(module, Attention):
                module.dropout = p""",
        new="",
        what="Dropout is switched off in all nn.Dropout modules, but attention holds its own rate as a number.",
        test="tests/test_model.py::test_trap07_set_dropout_finds_every_dropout"),
    Mistake("dropout-left-on", "train_dpo.py",
        old="    policy.set_dropout(0.0)",
        new="    policy.set_dropout(0.1)",
        what="The dropout of the SFT stage stays on, so policy and reference differ on the same row by chance.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update"),
    Mistake("reference-follows-the-policy", "train_dpo.py", shows="logps/chosen",
        old="        losses, *rewards = loss(*logps, reference_chosen, reference_rejected, **settings.variant)",
        new="        losses, *rewards = loss(*logps, *(l.detach() for l in logps), **settings.variant)",
        what="Policy and reference are one object, or share their weights, so each update changes the reference too.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs"),
    Mistake("cache-without-the-weights", "train_dpo.py", trained=False,
        old="    name = checkpoint.fingerprint(policy, run.data, rounding)",
        new="    name = checkpoint.fingerprint(run.data, rounding)",
        what="The cache of the reference is named after the data alone, and is used for another SFT model too.",
        test="tests/test_runs.py::test_trap09_fingerprint_names_all_that_the_numbers_depend_on"),
    Mistake("optimizer-of-another-copy", "train_dpo.py", shows="grad_norm",
        old="    optimizer = make_optimizer(policy, settings.optimizer, settings.lr)",
        new="    optimizer = make_optimizer(run.load()[0], settings.optimizer, settings.lr)",
        what="The optimiser holds the weights of one copy of the model, and the gradients go to another copy.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update"),
    Mistake("exact-gelu", "minidpo/model.py", trained=False,
        old='F.gelu(self.c_fc(x), approximate="tanh")',
        new="F.gelu(self.c_fc(x))",
        what="The default GELU of PyTorch is the exact one; GPT-2 was trained with the tanh approximation.",
        test="tests/test_model.py::test_forward_by_hand"),
    Mistake("head-tied-by-its-data", "minidpo/model.py",
        old="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)",
        new="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight.data)",
        what="The head reads the embedding through .data: the two share their values, but the head gives no gradient.",
        test="tests/test_model.py::test_trap14_the_head_is_the_embedding"),
    # ---- the step ----
    Mistake("mean-of-each-micro-batch", "train_dpo.py", flags=("--micro-batch-size", "8"), shows="grad_norm",
        old="        (losses.sum() / len(indices)).backward()",
        new="        losses.mean().backward()",
        what="Each micro-batch is averaged by itself and the gradients are added. k micro-batches make the gradient k "
             "times as long, and a short last one counts as much as a full one.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs"),
    Mistake("zero-grad-forgotten", "train_dpo.py", shows="grad_norm",
        old="""\
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)""",
        new="    optimizer.step()",
        what="The gradients are not set to 0 after a step, so the next step adds to them.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs"),
    # ---- metrics ----
    Mistake("average-of-averages", "train_dpo.py", trained=False,
        old="""\
    sums = metric_sums(*loss(*logps, *reference.T, **settings.variant), *logps)
    return {"eval/" + name: value for name, value in means(sums, len(pairs)).items()}""",
        new="""\
    batches = zip(logps.split(settings.batch_size, dim=1), reference.split(settings.batch_size), strict=True)
    sums = [metric_sums(*loss(*l, *r.T, **settings.variant), *l) / len(r) for l, r in batches]
    return {"eval/" + name: value for name, value in means(sum(sums), len(sums)).items()}""",
        what="The means of the batches are averaged, so the pairs of a short last batch count more than the others.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs"),
    Mistake("ties-lost", "train_dpo.py",
        old="    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)",
        new="    wins = (chosen_rewards > rejected_rewards).float()",
        what="A tie counts as a loss. Before the first update every pair is a tie.",
        test="tests/test_loss.py::test_trap11_ties_are_one_half"),
    Mistake("accuracy-without-the-reference", "train_dpo.py",
        old="    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)",
        new="    wins = (chosen_logps > rejected_logps).float()",
        what="A pair counts as won if the policy finds the chosen response more likely, not if its reward is higher.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs"),
    Mistake("kl-on-the-references-samples", "experiments/evaluate.py", trained=False,
        old="sequence_kl(policy, reference, ours.prompt_ids, ours.ids,",
        new="sequence_kl(policy, reference, theirs.prompt_ids, theirs.ids,",
        what="The KL is an expectation over the policy's samples, but it is computed on those of the reference.",
        test="tests/test_experiments.py::test_trap15_sampled_ids_are_never_encoded_again"),
    Mistake("kl-per-token", "experiments/evaluate.py", trained=False,
        old="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)",
        new="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1) / mask.sum(-1)",
        what="The KL is averaged over the tokens of a response. The objective has the KL of the whole response.",
        test="tests/test_experiments.py::test_trap15_both_estimators_have_the_exact_kl_as_their_mean"),
    # ---- runs ----
    Mistake("warm-up-again", "train_dpo.py", resumed=True, shows="lr",
        old="            lr = learning_rate(step, run.total_steps,",
        new="            lr = learning_rate(step - run.first_step, run.total_steps,",
        what="A resumed run counts its own steps for the schedule and warms up a second time.",
        test="tests/test_runs.py::test_trap18_10_steps_are_some_and_resume_and_the_rest[3-dpo-flags3]"),
    Mistake("evaluation-moves-the-rng", "minidpo/dataset.py", trained=False,
        old="    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**64)",
        new="    generator = torch.default_generator",
        what="The shuffle draws from the global generator, and an evaluation in the middle of training shuffles too.",
        test="tests/test_runs.py::test_trap17_evaluating_and_sampling_change_no_weights[sft]"),
    Mistake("wrapped-names-saved", "minidpo/checkpoint.py", trained=False,
        old='        name.replace("_orig_mod.", "").replace("module.", ""): weight.detach().cpu()',
        new="        name: weight.detach().cpu()",
        what="torch.compile and wrappers for several GPUs put a prefix on the name of every weight. It is saved too.",
        test="tests/test_model.py::test_trap19_a_wrappers_name_is_not_saved"),
]
