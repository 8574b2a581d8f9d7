"""The gallery: our own code with one mistake each, of the kind that runs without an error and trains a wrong model.

Read it from top to bottom, beside the file that is changed. `old` is the source text, which occurs once in the file;
`new` is the same place with the mistake.
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
    see: str  # what the curves of a DPO run show
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
        see="The loss hardly falls: it asks both responses to become more likely. The margin, logged as the "
            "difference, stays around 0 and the accuracy near one half.",
        test="tests/test_loss.py::test_policy_minus_reference_not_the_reverse"),
    Mistake("chosen-and-rejected-swapped", "minidpo/dataset.py",
        old="    return PreferenceBatch(chosen, rejected)",
        new="    return PreferenceBatch(rejected, chosen)",
        what="The two sides change places on the way into the batch, for instance because a dataset lists its worse "
             "response first.",
        see="Nothing: loss, margins and accuracy look like those of a healthy run. The policy learns the opposite of "
            "what was asked, and only its samples show it.",
        test="tests/test_data.py::test_preference_batch_scores_both_sides_as_they_stand"),
    Mistake("reference-added", "train_dpo.py", shows="rewards/chosen",
        old="""\
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps""",
        new="""\
    chosen_log_ratios = policy_chosen_logps + reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps + reference_rejected_logps""",
        what="log pi + log pi_ref instead of log pi - log pi_ref. Code that has all four log-probabilities in one line "
             "loses this sign easily.",
        see="The loss starts far above ln 2 = 0.693 and the rewards tens of nats below 0, because log-probabilities of "
            "whole responses are added. The accuracy stays near one half, and the policy moves far from the reference: "
            "nothing in the loss says where the reference is.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2"),
    Mistake("beta-inverted", "train_dpo.py", flags=("--beta", "0.1"), shows="loss",
        old="    h = chosen_log_ratios - rejected_log_ratios",
        new="""\
    beta = 1 / beta
    h = chosen_log_ratios - rejected_log_ratios""",
        what="Division by beta instead of multiplication, from reading beta as a temperature. (At beta 1 the two are "
             "the same, so this run has the paper's 0.1.)",
        see="The margins are tens of times too large within a few steps, and the loss rises above ln 2 and jumps. The "
            "policy stays closer to the reference than was asked.",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference"),
    Mistake("beta-missing-from-the-rewards", "train_dpo.py", shows="loss",
        old="    return losses, (beta * chosen_log_ratios).detach(), (beta * rejected_log_ratios).detach()",
        new="    return losses, chosen_log_ratios.detach(), rejected_log_ratios.detach()",
        what="Beta is in the loss only: the log-ratios are logged as rewards without it.",
        see="Training is right, and so are loss and accuracy. Rewards and margins are 1 / beta times too large, so "
            "runs with different beta cannot be compared.",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference"),
    Mistake("no-log-sigmoid", "train_dpo.py", shows="loss",
        old="        losses = -F.logsigmoid(margins)  # (7)",
        new="        losses = -margins  # (7)",
        what="The margin itself is maximised, as if the log-sigmoid around it changed nothing.",
        see="The loss starts at 0 instead of ln 2 and falls without end. No margin is ever large enough: every pair "
            "has weight 1, and the policy moves far from the reference.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2"),
    Mistake("log-of-sigmoid", "train_dpo.py", shows="loss",
        old="        losses = -F.logsigmoid(margins)  # (7)",
        new="        losses = -torch.log(torch.sigmoid(margins))  # (7)",
        what="The formula of the paper in two calls. In fp32, sigmoid(-104) is 0 and its logarithm is minus infinity.",
        see="Nothing, until the margin of one pair falls below -100. Then the loss is infinite and the gradient NaN.",
        test="tests/test_loss.py::test_margins_of_a_thousand_stay_finite"),
    Mistake("robust-for-conservative", "train_dpo.py", flags=("--label-smoothing", "0.1"), shows="loss",
        old="            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)",
        new="""\
            losses = (1 - label_smoothing) * losses + label_smoothing * F.logsigmoid(-margins)
            losses = losses / (1 - 2 * label_smoothing)""",
        what="Two losses are called label smoothing. Conservative DPO adds the loss of the flipped label; robust DPO "
             "subtracts it and divides by 1 - 2e.",
        see="Both start at ln 2. The conservative loss has a minimum (0.325 nats at e = 0.1) at a finite margin. The "
            "robust loss has none and continues to fall.",
        test="tests/test_loss.py::test_trap20_label_smoothing_is_conservative_dpo_by_hand"),
    Mistake("ipo-with-beta-in-the-margin", "train_dpo.py", flags=("--loss-type", "ipo"), shows="loss",
        old="        losses = (h - 1 / (2 * beta)) ** 2",
        new="        losses = (margins - 1 / (2 * beta)) ** 2",
        what="The target of IPO, 1 / (2 beta), is for the log-ratios without beta. Here it is compared with a margin "
             "that contains beta.",
        see="The loss starts at the right value, 1 / (2 beta)^2, and then looks better than the right one, which "
            "weighs every deviation 1 / beta^2 times as much. The margin approaches 1 / (2 beta) instead of 1/2.",
        test="tests/test_loss.py::test_ipo_by_hand"),
    # ---- log-probabilities ----
    Mistake("mean-over-tokens", "train_dpo.py", shows="logps/chosen",
        old="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1))",
        new="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1) / side.mask.sum(dim=-1))",
        what="The mean over the response instead of the sum, as in the loss of a language model. It divides beta by "
             "the length, response by response.",
        see="logps/chosen is about one nat instead of tens, and the margins are more than ten times too small, though "
            "the accuracy rises. Beta is too small in effect, so the policy moves three times as far from the "
            "reference.",
        test="tests/test_loss.py::test_trap01_response_logps_are_sums_over_the_response"),
    Mistake("mask-left-out", "train_dpo.py", shows="logps/chosen",
        old="        sums.append(logps.masked_fill(~side.mask, 0.0).sum(dim=-1))",
        new="        sums.append(logps.sum(dim=-1))",
        what="`masked_fill` is left out: the log-probabilities of prompt and padding are summed too.",
        see="The loss still starts at ln 2 and then jumps. logps/chosen is nine times too low, and grad_norm more than "
            "ten times too high. The prompt is the same on both sides and cancels in the margin; the padding does not.",
        test="tests/test_loss.py::test_trap01_response_logps_are_sums_over_the_response"),
    Mistake("softmax-over-positions", "train_dpo.py", shows="logps/chosen",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = F.log_softmax(logits, dim=1)",
        what="Normalised over the positions of the row instead of over the vocabulary: dim=1 would be right for logits "
             "of shape (B, V).",
        see="The loss stays at ln 2 or above, and the accuracy near one half: what is trained is not the probability "
            "of a token.",
        test="tests/test_loss.py::test_token_logps_by_loop"),
    Mistake("raw-logits", "train_dpo.py", shows="logps/chosen",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = logits",
        what="The log-softmax is left out, and logits are summed as if they were log-probabilities.",
        see="logps/chosen is above 0, which no log-probability can be. The margins are as large as healthy ones, but "
            "the loss hardly falls and the policy moves less than half as far: to raise all logits together changes no "
            "probability.",
        test="tests/test_loss.py::test_token_logps_by_loop"),
    Mistake("log-softmax-in-bf16", "train_dpo.py",
        old="    logps = F.log_softmax(logits, dim=-1)",
        new="    logps = F.log_softmax(logits.bfloat16(), dim=-1).float()",
        what="The log-softmax is computed in bf16, as in a model that was cast to bf16 as a whole. The steps of bf16 "
             "are 0.25 at -40 nats and 2 at -300.",
        see="Hardly anything on the toy's short responses: the accuracy of the first steps is noise. Over hundreds of "
            "tokens, each sum is wrong by whole nats.",
        test="tests/test_loss.py::test_trap06_long_responses_of_shifted_logits"),
    Mistake("rejected-detached", "train_dpo.py", shows="rewards/chosen",
        old="    return sums[0], sums[1]",
        new="    return sums[0], sums[1].detach()",
        what="The gradient of one side is cut, for instance by a torch.no_grad() that was meant for the reference.",
        see="The margin grows half as far, and the chosen reward rises, where a healthy one stays near 0 or falls: "
            "nothing pushes the rejected response down.",
        test="tests/test_loss.py::test_both_sides_get_their_gradient"),
    # ---- rows, targets, masks ----
    Mistake("merge-across-the-border", "minidpo/dataset.py", trained=False,
        old="        prompt, *responses = (tokenizer.encode(record[field]) for field in fields)",
        new="""\
        prompt = tokenizer.encode(record["prompt"])
        responses = [tokenizer.encode(record["prompt"] + record[side])[len(prompt) :] for side in fields[1:]]""",
        what="Prompt and response are encoded as one text and cut at the length of the prompt. But a BPE merge can "
             "cross the border, and then the cut removes the first part of the response.",
        see="Nothing where prompts end at the end of a word, as the toy's do. Elsewhere the first word of some "
            "responses is missing, sometimes the word that decides which one is better.",
        test="tests/test_data.py::test_trap02_no_merge_crosses_the_border"),
    Mistake("no-end-of-response", "minidpo/dataset.py", shows="logps/chosen",
        old="[r[:room] if len(r) > room else r + [eot] if e else r for r, e in zip(responses, ended, strict=True)]",
        new="[r[:room] for r in responses]",
        what="The eot after the response is left out: the texts look complete without it.",
        see="Nothing on the toy, where the last sentence shows that the end has come. Where a response can stop "
            "anywhere, the model does not learn when to stop, and the length of its samples drifts.",
        test="tests/test_loss.py::test_trap03_the_final_eot_counts"),
    Mistake("targets-not-shifted", "minidpo/dataset.py", shows="logps/chosen",
        old="        targets[i, :n] = row[1:]",
        new="        targets[i, :n] = row[:-1]",
        what="The target of a position is its own token. The shift by one was left to the model; the models of some "
             "libraries do it, ours does not.",
        see="logps/chosen is more than ten times too low. The loss still starts at ln 2, and the margin grows; the "
            "samples hardly change.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike"),
    Mistake("mask-off-by-one", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) : n] = True",
        what="The targets are shifted by one and the mask is not: the first token of the response is never scored.",
        see="Almost nothing: one token is missing from every sum. Where responses are one token long, that token was "
            "the whole signal.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike"),
    Mistake("mask-by-id", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) - 1 : n] = row[len(prompt) :] != prompt[0]",
        what="Every token with the id of eot is taken for padding, since GPT-2 has no padding token of its own. The "
             "eot at the end of the response is then masked too.",
        see="The same as without an eot: nothing on the toy, and a drifting length elsewhere.",
        test="tests/test_data.py::test_trap04_eot_padding_and_text_may_share_an_id"),
    Mistake("prompt-scored", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, :n] = True",
        what="The mask covers the prompt too, as in pretraining.",
        see="Loss, margins and accuracy do not change: both sides have the same prompt, and it cancels. The two "
            "rewards and logps/chosen contain the prompt and are wrong.",
        test="tests/test_data.py::test_trap03_the_scored_targets_are_the_response_to_its_eot"),
    Mistake("padding-scored", "minidpo/dataset.py", shows="logps/chosen",
        old="        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token",
        new="        mask[i, len(prompt) - 1 :] = True",
        what="The mask runs to the end of the tensor instead of the end of the row.",
        see="logps/chosen is several times too low and depends on the longest row of the batch; grad_norm is ten times "
            "too high, and the loss jumps. Padding is scored like text, and its length becomes part of the signal.",
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
        see="The loss still starts at ln 2 if the reference saw the same batches, so the start does not show the "
            "mistake. Then it rises above ln 2, with a grad_norm several times too high.",
        test="tests/test_loss.py::test_trap12_padding_and_company_change_nothing"),
    # ---- policy, reference, model ----
    Mistake("dropout-missed-in-attention", "minidpo/model.py", trained=False,
        old="""\

            elif isinstance(module, Attention):
                module.dropout = p""",
        new="",
        what="Dropout is switched off in all nn.Dropout modules, but attention holds its own rate as a number.",
        see="If the SFT model was trained with dropout, the run stops before its first update, because the log-ratios "
            "are not 0. With any other SFT model, nothing.",
        test="tests/test_model.py::test_trap07_set_dropout_finds_every_dropout"),
    Mistake("dropout-left-on", "train_dpo.py",
        old="    policy.set_dropout(0.0)",
        new="    policy.set_dropout(0.1)",
        what="Policy and reference run in train mode with the dropout of the SFT stage, so they differ on the same row "
             "by chance.",
        see="No curve: the run stops before its first update, because the log-ratios are not 0. Without that check the "
            "margins would start as noise around 0.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update"),
    Mistake("reference-follows-the-policy", "train_dpo.py", shows="logps/chosen",
        old="        losses, *rewards = loss(*logps, reference_chosen, reference_rejected, **settings.variant)",
        new="        losses, *rewards = loss(*logps, *(l.detach() for l in logps), **settings.variant)",
        what="Policy and reference are one object (for instance a copy that shares its weights), so each update "
             "changes the reference too.",
        see="The loss stays at ln 2, the margins at 0 and the accuracy at one half, as if nothing were learnt. But "
            "every pair keeps its weight of 1/2, and nothing holds the policy near its start: only the falling logps "
            "show it.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs"),
    Mistake("cache-without-the-weights", "train_dpo.py", trained=False,
        old="    name = checkpoint.fingerprint(policy, run.data, rounding)",
        new="    name = checkpoint.fingerprint(run.data, rounding)",
        what="The reference's log-probabilities are kept on disk under the name of the data alone, and are found again "
             "after the SFT model has changed.",
        see="Nothing in the first run. The next run, from another SFT model, stops before its first update, because "
            "the log-ratios are not 0.",
        test="tests/test_runs.py::test_trap09_fingerprint_names_all_that_the_numbers_depend_on"),
    Mistake("optimizer-of-another-copy", "train_dpo.py", shows="grad_norm",
        old="    optimizer = make_optimizer(policy, settings.optimizer, settings.lr)",
        new="    optimizer = make_optimizer(run.load()[0], settings.optimizer, settings.lr)",
        what="The optimiser holds the weights of one copy of the model, and the gradients go to another copy.",
        see="The loss stays at ln 2 and the margins at exactly 0, while grad_norm climbs above the clipping length of "
            "10 and stays there: nothing sets the policy's gradients back to 0.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update"),
    Mistake("exact-gelu", "minidpo/model.py", trained=False,
        old='F.gelu(self.c_fc(x), approximate="tanh")',
        new="F.gelu(self.c_fc(x))",
        what="The default GELU of PyTorch is the exact one; GPT-2 was trained with the tanh approximation.",
        see="Nothing for a model trained from scratch. An imported GPT-2 is a little worse than it should be, from the "
            "first step on.",
        test="tests/test_model.py::test_forward_by_hand"),
    Mistake("head-tied-by-its-data", "minidpo/model.py",
        old="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)",
        new="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight.data)",
        what="The output head reads the embedding through .data, so no gradient comes back through it: the two share "
             "their values and not their training.",
        see="A run that looks healthy and learns more slowly: the embedding gets a gradient from the tokens that were "
            "read, not from those that were predicted.",
        test="tests/test_model.py::test_trap14_the_head_is_the_embedding"),
    # ---- the step ----
    Mistake("mean-of-each-micro-batch", "train_dpo.py", flags=("--micro-batch-size", "8"), shows="grad_norm",
        old="        (losses.sum() / len(indices)).backward()",
        new="        losses.mean().backward()",
        what="Each micro-batch is averaged by itself and the gradients are added. k micro-batches make the gradient k "
             "times as long, and a short last one counts as much as a full one.",
        see="grad_norm is too large by the number of micro-batches (four here). AdamW divides by the size of the "
            "gradient and hides the rest; clipping and SGD do not.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs"),
    Mistake("zero-grad-forgotten", "train_dpo.py", shows="grad_norm",
        old="""\
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)""",
        new="    optimizer.step()",
        what="The gradients are not set to 0 after a step, so the next step adds to them.",
        see="grad_norm climbs above the clipping length of 10 and stays there. The margins grow too large, and the "
            "policy moves several times as far from the reference: each step repeats all steps before it.",
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
        see="Held-out figures that are slightly wrong, and change with the batch size.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs"),
    Mistake("ties-lost", "train_dpo.py",
        old="    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)",
        new="    wins = (chosen_rewards > rejected_rewards).float()",
        what="A tie counts as a loss. Before the first update every pair is a tie.",
        see="The accuracy starts at 0 instead of one half, so the first step looks like great progress.",
        test="tests/test_loss.py::test_trap11_ties_are_one_half"),
    Mistake("accuracy-without-the-reference", "train_dpo.py",
        old="    wins = (chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)",
        new="    wins = (chosen_logps > rejected_logps).float()",
        what="A pair counts as won if the policy finds the chosen response more likely, not if its reward is higher.",
        see="Training is right, but the accuracy answers another question. It does not start at one half, and hardly "
            "moves: on the toy the shorter response is the more likely one in four of five pairs.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs"),
    Mistake("kl-on-the-references-samples", "experiments/evaluate.py", trained=False,
        old="sequence_kl(policy, reference, ours.prompt_ids, ours.ids,",
        new="sequence_kl(policy, reference, theirs.prompt_ids, theirs.ids,",
        what="The KL is an expectation under the policy, but it is computed on other texts: samples of the reference, "
             "or the pairs of the dataset.",
        see="Nothing in training. The plain estimate comes out negative, which no KL can be.",
        test="tests/test_experiments.py::test_trap15_sampled_ids_are_never_encoded_again"),
    Mistake("kl-per-token", "experiments/evaluate.py", trained=False,
        old="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)",
        new="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1) / mask.sum(-1)",
        what="The KL is averaged over the tokens of a response. The objective has the KL of the whole response.",
        see="Nothing in training. The KL comes out too small by the number of tokens per response, and long responses "
            "seem as close to the reference as short ones.",
        test="tests/test_experiments.py::test_trap15_both_estimators_have_the_exact_kl_as_their_mean"),
    # ---- runs ----
    Mistake("warm-up-again", "train_dpo.py", resumed=True, shows="lr",
        old="            lr = learning_rate(step, run.total_steps,",
        new="            lr = learning_rate(step - run.first_step, run.total_steps,",
        what="A resumed run counts its own steps for the schedule and warms up a second time.",
        see="The learning rate drops to its first value where the run was resumed, and is too high at the end.",
        test="tests/test_runs.py::test_trap18_10_steps_are_some_and_resume_and_the_rest[3-dpo-flags3]"),
    Mistake("evaluation-moves-the-rng", "minidpo/dataset.py", trained=False,
        old="    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)",
        new="    generator = torch.default_generator",
        what="The shuffle draws from the global generator, and an evaluation in the middle of training shuffles too.",
        see="Nothing in the first epoch. After it, the number of evaluations changes the order of the pairs, and so "
            "the weights.",
        test="tests/test_runs.py::test_trap17_evaluating_and_sampling_change_no_weights[sft]"),
    Mistake("wrapped-names-saved", "minidpo/checkpoint.py", trained=False,
        old='        name.replace("_orig_mod.", "").replace("module.", ""): weight.detach().cpu()',
        new="        name: weight.detach().cpu()",
        what="torch.compile and wrappers for several GPUs put a prefix in front of the name of every weight, and it is "
             "saved too.",
        see="Nothing, until the checkpoint is loaded into a plain model and no name fits.",
        test="tests/test_model.py::test_trap19_a_wrappers_name_is_not_saved"),
]
