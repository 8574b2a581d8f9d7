"""The mutants: our own code with one mistake each, the kind that runs without an error and trains a wrong model.

To be read from top to bottom, beside the file it changes. `old` is the source as it stands, `new` the same place with
the mistake; a text of several lines is a change of neighbouring lines.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One mistake: where it is, what it does, and the test that finds it."""

    name: str
    file: str  # from the root of the repository
    old: str  # exact source text, occurs once in the file
    new: str
    mistake: str  # what is wrong, and how one comes to write it
    see: str  # what the curves of a DPO run show
    test: str  # the pytest node id of a test that fails
    trained: bool = True  # whether `--curves` trains with it: it can change a DPO run from an SFT model
    flags: tuple = ()  # of train_dpo.py, where the mistake needs them to come into play
    resumed: bool = False  # stop the run half-way and go on with --resume
    shows: str = "rewards/accuracies"  # the metric to draw below the margins


REWARDS = """\
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)  # (5) without its beta log Z(x) ...
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)"""
LOG_SOFTMAX = "    logps = F.log_softmax(logits, dim=-1)  # (B, T, V): of every token that could stand there"
LOSS = "        losses = -F.logsigmoid(margins)  # (7)"
WINS = "(chosen_rewards > rejected_rewards) + 0.5 * (chosen_rewards == rejected_rewards)"
SMOOTHED = "            losses = (1 - label_smoothing) * losses - label_smoothing * F.logsigmoid(-margins)"
ROW = """\
        ids[i, :n] = row[:-1]
        targets[i, :n] = row[1:]
        mask[i, len(prompt) - 1 : n] = True  # the last prompt token predicts the first response token"""
MASK = ROW.splitlines()[2]
EVALUATE = """\
        sums = sums + summed(*dpo_loss(*logps, *reference[indices].to(settings.device).T, **settings.variant), *logps)
    return {"eval/" + name: value for name, value in means(sums, len(rows)).items()}"""

GALLERY = [
    # ---- the loss ----
    Mutant(
        name="log-ratios-added",
        file="train_dpo.py",
        old="    margins = chosen_rewards - rejected_rewards  # ... which cancels here",
        new="    margins = chosen_rewards + rejected_rewards  # ... which cancels here",
        mistake="The two log-ratios are added. A sign is soon lost when the four log-probabilities are regrouped.",
        see="The loss hardly falls. It asks both responses to become likelier; the margin, logged as the difference, "
        "stays around 0 and the accuracy near one half.",
        test="tests/test_loss.py::test_policy_minus_reference_not_the_reverse",
        shows="loss",
    ),
    Mutant(
        name="chosen-and-rejected-swapped",
        file="minidpo/dataset.py",
        old="    return PreferenceBatch(chosen, rejected)",
        new="    return PreferenceBatch(rejected, chosen)",
        mistake="The sides change places on the way into the batch, for instance because a data set calls its worse "
        "response the first.",
        see="Nothing: loss, margins and accuracy are like those of a healthy run. The policy learns the opposite of "
        "what was asked, which only its samples tell.",
        test="tests/test_data.py::test_preference_batch_scores_both_sides_as_they_stand",
    ),
    Mutant(
        name="reference-added",
        file="train_dpo.py",
        old=REWARDS,
        new=REWARDS.replace("_logps - reference", "_logps + reference"),
        mistake="log pi + log pi_ref where the log of a quotient belongs: retellings that write the loss with four "
        "logarithms in a row drop the sign.",
        see="The loss starts far above ln 2 = 0.693, and the rewards tens of nats below 0, since log-probabilities "
        "of whole responses are added up. The accuracy stays near one half, and the policy runs away: nothing "
        "says where the reference was.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2",
        shows="rewards/chosen",
    ),
    Mutant(
        name="beta-inverted",
        file="train_dpo.py",
        old=REWARDS,
        new=REWARDS.replace("beta * (", "1 / beta * ("),
        mistake="Divided by beta instead of multiplied, from reading beta as a temperature. (At beta 1 the two are "
        "one, so this run has the paper's 0.1.)",
        see="The margins are tens of times too large within a few steps, and the loss rises above ln 2 and jumps. "
        "The policy stays closer to the reference than was asked.",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference",
        flags=("--beta", "0.1"),
        shows="loss",
    ),
    Mutant(
        name="beta-missing-from-the-rewards",
        file="train_dpo.py",
        old="    return losses, chosen_rewards.detach(), rejected_rewards.detach()",
        new="    return losses, chosen_rewards.detach() / beta, rejected_rewards.detach() / beta",
        mistake="Beta stands in the loss only, and the bare log-ratios are logged as rewards.",
        see="Training is right, and loss and accuracy with it; rewards and margins are 1 / beta times too large, so "
        "that runs with different beta cannot be compared.",
        test="tests/test_loss.py::test_trap16_rewards_carry_beta_and_the_reference",
        shows="loss",
    ),
    Mutant(
        name="no-log-sigmoid",
        file="train_dpo.py",
        old=LOSS,
        new="        losses = -margins  # (7)",
        mistake="The margin itself is maximised: the log-sigmoid looks like a monotone ornament.",
        see="The loss starts at 0 instead of ln 2 and falls without end. No pair is ever good enough, every one "
        "pulls with weight 1, and the policy runs away from the reference.",
        test="tests/test_loss.py::test_loss_starts_at_ln_2",
        shows="loss",
    ),
    Mutant(
        name="log-of-sigmoid",
        file="train_dpo.py",
        old=LOSS,
        new="        losses = -torch.log(torch.sigmoid(margins))  # (7)",
        mistake="The formula as it stands in the paper, in two calls. In fp32 sigmoid(-104) is 0, and its logarithm "
        "minus infinity.",
        see="Nothing, until one pair's margin falls below -100: then an infinite loss and a gradient of NaN.",
        test="tests/test_loss.py::test_margins_of_a_thousand_stay_finite",
        shows="loss",
    ),
    Mutant(
        name="robust-for-conservative",
        file="train_dpo.py",
        old=SMOOTHED,
        new=SMOOTHED.replace("= (1 - ", "= ((1 - ").replace(
            "- label_smoothing * F.logsigmoid(-margins)", "+ label_smoothing * F.logsigmoid(-margins)"
        )
        + ") / (1 - 2 * label_smoothing)",
        mistake="Two losses share the name label smoothing: conservative DPO adds the flipped label's loss, robust "
        "DPO subtracts it and divides by 1 - 2 e.",
        see="Both start at ln 2. The conservative loss has a floor (0.325 nats at e = 0.1) and a margin at which it "
        "is reached; the robust one has neither and goes on falling.",
        test="tests/test_loss.py::test_trap20_label_smoothing_is_conservative_dpo_by_hand",
        flags=("--label-smoothing", "0.1"),
        shows="loss",
    ),
    Mutant(
        name="ipo-with-beta-in-the-margin",
        file="train_dpo.py",
        old="        losses = (margins / beta - 1 / (2 * beta)) ** 2",
        new="        losses = (margins - 1 / (2 * beta)) ** 2",
        mistake="IPO's target 1 / (2 beta) is for the bare log-ratios; here it meets a margin that beta has scaled.",
        see="The loss starts where it should, at 1 / (2 beta)^2, and then looks better than the right one, which "
        "weighs every deviation 1 / beta^2 times as much. The margin heads for 1 / (2 beta) instead of 1/2.",
        test="tests/test_loss.py::test_ipo_by_hand",
        flags=("--loss-type", "ipo"),
        shows="loss",
    ),
    # ---- log-probabilities ----
    Mutant(
        name="mean-over-tokens",
        file="train_dpo.py",
        old="        sums.append(logps.masked_fill(~rows.mask, 0.0).sum(dim=-1))",
        new="        sums.append(logps.masked_fill(~rows.mask, 0.0).sum(dim=-1) / rows.mask.sum(dim=-1))",
        mistake="The mean over the response instead of the sum, as a language model's loss has it. It divides beta "
        "by the length, pair by pair.",
        see="logps/chosen is a nat or so instead of tens, and the margins stay an order of magnitude too small, "
        "though the accuracy rises. With the leash so much longer, the policy strays several times as far.",
        test="tests/test_loss.py::test_trap01_response_logps_are_sums_over_the_response",
        shows="logps/chosen",
    ),
    Mutant(
        name="softmax-over-positions",
        file="train_dpo.py",
        old=LOG_SOFTMAX,
        new=LOG_SOFTMAX.replace("dim=-1", "dim=1"),
        mistake="Normalised over the positions of the row instead of over the vocabulary: dim=1, from the days when "
        "logits were (B, V).",
        see="The loss starts at ln 2 and stays there or above, and the accuracy does not get far from one half: what "
        "is trained is no probability of a word.",
        test="tests/test_loss.py::test_token_logps_by_loop",
        shows="logps/chosen",
    ),
    Mutant(
        name="raw-logits",
        file="train_dpo.py",
        old=LOG_SOFTMAX,
        new=LOG_SOFTMAX.replace("F.log_softmax(logits, dim=-1)", "logits"),
        mistake="The log-softmax is forgotten, and logits are summed as if they were log-probabilities.",
        see="logps/chosen is above 0, which no log-probability is. The margins are as large as healthy ones, while "
        "the loss hardly falls and the policy moves less than half as far: a logit that rises together with all "
        "the others changes no probability.",
        test="tests/test_loss.py::test_token_logps_by_loop",
        shows="logps/chosen",
    ),
    Mutant(
        name="log-softmax-in-bf16",
        file="train_dpo.py",
        old=LOG_SOFTMAX,
        new=LOG_SOFTMAX.replace("(logits, dim=-1)", "(logits.bfloat16(), dim=-1).float()"),
        mistake="What a model cast to bf16 as a whole does. At -40 nats bf16 steps by 0.25, at -300 by 2.",
        see="Hardly anything on the toy's short responses: the accuracy of the first steps is noise. Over hundreds "
        "of tokens each sum is off by whole nats.",
        test="tests/test_loss.py::test_trap06_long_responses_of_shifted_logits",
    ),
    Mutant(
        name="rejected-detached",
        file="train_dpo.py",
        old="    return sums[0], sums[1]",
        new="    return sums[0], sums[1].detach()",
        mistake="The gradient of one side is cut, as by a torch.no_grad() that was meant for the reference.",
        see="The margin grows half as far, and it is the chosen reward that rises, where a healthy one stays near 0 "
        "or falls: nothing pushes the rejected response down.",
        test="tests/test_loss.py::test_both_sides_get_their_gradient",
        shows="rewards/chosen",
    ),
    # ---- rows, targets, masks ----
    Mutant(
        name="merge-across-the-border",
        file="minidpo/dataset.py",
        old="        prompt, chosen, rejected = (tokenizer.encode(record[field]) for field in PAIR)",
        new="""\
        prompt = tokenizer.encode(record["prompt"])
        chosen, rejected = (tokenizer.encode(record["prompt"] + record[side])[len(prompt) :] for side in PAIR[1:])""",
        mistake="Prompt and response are encoded as one text and cut at the prompt's length, but a BPE merge may "
        "cross the border: the cut then takes away the first piece of the response.",
        see="Nothing where prompts end at the end of a word, as the toy's do. Elsewhere the first word of some "
        "responses is missing, at times the one that decides which is better.",
        test="tests/test_data.py::test_trap02_no_merge_crosses_the_border",
        trained=False,
    ),
    Mutant(
        name="no-end-of-response",
        file="minidpo/dataset.py",
        old="[r[:room] if len(r) > room else r + [eot] if e else r for r, e in zip(responses, ended, strict=True)]",
        new="[r[:room] for r in responses]",
        mistake="No eot behind the response: the texts look complete without it.",
        see="Nothing on the toy, where the last sentence says that the end has come. Where a response may stop "
        "anywhere, when to stop is the one decision that is not trained, and the length of the samples drifts.",
        test="tests/test_data.py::test_fit_keeps_a_short_prompt_whole_and_pads_none",
        shows="logps/chosen",
    ),
    Mutant(
        name="targets-not-shifted",
        file="minidpo/dataset.py",
        old="        targets[i, :n] = row[1:]",
        new="        targets[i, :n] = row[:-1]",
        mistake="The target of a position is its own token: the shift by one was left to the model, as some "
        "libraries do, and ours does not.",
        see="logps/chosen is more than ten times too low. The loss starts at ln 2 all the same, and the margin "
        "grows; the samples hardly change.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike",
        shows="logps/chosen",
    ),
    Mutant(
        name="mask-off-by-one",
        file="minidpo/dataset.py",
        old=MASK,
        new="        mask[i, len(prompt) : n] = True",
        mistake="The targets are shifted by one and the mask is not: the first response token is never scored.",
        see="Next to nothing: one token in many is missing from every sum. Where responses are one token long, that "
        "was all of the signal.",
        test="tests/test_data.py::test_trap05_targets_and_mask_are_shifted_alike",
        shows="logps/chosen",
    ),
    Mutant(
        name="mask-by-id",
        file="minidpo/dataset.py",
        old=MASK,
        new="        mask[i, len(prompt) - 1 : n] = row[len(prompt) :] != prompt[0]",
        mistake="Everything with the id of eot is taken for padding, since GPT-2 has no other token to pad with. The "
        "real end of the response goes with it.",
        see="The same as without an eot: nothing on the toy, and a drifting length elsewhere.",
        test="tests/test_data.py::test_trap04_eot_padding_and_text_may_share_an_id",
        shows="logps/chosen",
    ),
    Mutant(
        name="prompt-scored",
        file="minidpo/dataset.py",
        old=MASK,
        new="        mask[i, :n] = True",
        mistake="No mask over the prompt, as in pretraining.",
        see="Loss, margins and accuracy are untouched: both sides have the same prompt, and it cancels. The two "
        "rewards and logps/chosen each hold the prompt as well and are wrong.",
        test="tests/test_data.py::test_trap03_the_scored_targets_are_the_response_to_its_eot",
        shows="logps/chosen",
    ),
    Mutant(
        name="padding-scored",
        file="minidpo/dataset.py",
        old=MASK,
        new="        mask[i, len(prompt) - 1 :] = True",
        mistake="The mask runs to the end of the tensor instead of the end of the row.",
        see="logps/chosen is several times too low and depends on the longest row of the batch; grad_norm is ten "
        "times too high, and the loss jumps. The padding is text too, and its amount a signal.",
        test="tests/test_data.py::test_trap12_company_adds_padding_and_nothing_else",
        shows="logps/chosen",
    ),
    Mutant(
        name="left-padding",
        file="minidpo/dataset.py",
        old=ROW,
        new="""\
        ids[i, T - n :] = row[:-1]
        targets[i, T - n :] = row[1:]
        mask[i, T - n + len(prompt) - 1 :] = True""",
        mistake="Rows padded on the left, as sampling needs them, but without the positions and the attention mask "
        "that go with it: a row's numbers depend on the longest row beside it.",
        see="The loss starts at ln 2 all the same, as long as the reference saw the very same batches, so the start "
        "does not betray it. Then it rises above ln 2, with a grad_norm several times too high.",
        test="tests/test_loss.py::test_trap12_padding_and_company_change_nothing",
        shows="loss",
    ),
    # ---- policy, reference, model ----
    Mutant(
        name="dropout-missed-in-attention",
        file="minidpo/model.py",
        old="""
            elif isinstance(module, Attention):
                module.dropout = p""",
        new="",
        mistake="Dropout is switched off by a walk over the nn.Dropout modules, and attention holds its own as a "
        "number.",
        see="With an SFT model that was trained with dropout, the run stops before its first update, because the "
        "log-ratios are not 0. With any other, nothing.",
        test="tests/test_model.py::test_trap07_set_dropout_finds_every_dropout",
        trained=False,
    ),
    Mutant(
        name="dropout-left-on",
        file="train_dpo.py",
        old="    policy.to(settings.device).set_dropout(0.0)",
        new="    policy.to(settings.device).set_dropout(0.1)",
        mistake="Policy and reference run in train mode with the dropout of the SFT stage, and differ on the same "
        "row by chance.",
        see="No curve: the run stops before its first update, because the log-ratios are not 0. Without that check "
        "the margins would start as noise around 0.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update",
    ),
    Mutant(
        name="reference-follows-the-policy",
        file="train_dpo.py",
        old="        losses, *rewards = dpo_loss(*logps, *reference[micro].to(settings.device).T, **settings.variant)",
        new="        losses, *rewards = dpo_loss(*logps, *(l.detach() for l in logps), **settings.variant)",
        mistake="Policy and reference are one object (a copy that shares its weights), so that the reference is "
        "updated along.",
        see="The loss stays at ln 2, margins at 0 and accuracy at one half, as if nothing were learnt. But every "
        "pair keeps its full weight of 1/2, and the policy runs away without a leash; only the sinking logps "
        "tell.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs",
        shows="logps/chosen",
    ),
    Mutant(
        name="cache-without-the-weights",
        file="train_dpo.py",
        old="        name = checkpoint.fingerprint(policy, data_fingerprint, rounding)",
        new="        name = checkpoint.fingerprint(data_fingerprint, rounding)",
        mistake="The reference's log-probabilities are kept on disk under the name of the data alone, and found "
        "again after the SFT model was trained anew.",
        see="Nothing in the first run. In the next one from another SFT model, the run stops before its first "
        "update, because the log-ratios are not 0.",
        test="tests/test_runs.py::test_trap09_fingerprint_names_all_that_the_numbers_depend_on",
        trained=False,
    ),
    Mutant(
        name="optimizer-of-another-copy",
        file="train_dpo.py",
        old="    optimizer = make_optimizer(policy, settings.optimizer, settings.lr)",
        new="    optimizer = make_optimizer(checkpoint.load(settings.init)[0], settings.optimizer, settings.lr)",
        mistake="The optimiser was given the weights of a model that was then loaded or copied again, and steps on "
        "those.",
        see="The loss stays at ln 2 and the margins at exactly 0, while grad_norm climbs above the clipping length "
        "of 10 and stays there: nobody sets the policy's gradients back.",
        test="tests/test_runs.py::test_trap08_log_ratios_are_0_before_the_first_update",
        shows="grad_norm",
    ),
    Mutant(
        name="exact-gelu",
        file="minidpo/model.py",
        old='F.gelu(self.c_fc(x), approximate="tanh")',
        new="F.gelu(self.c_fc(x))",
        mistake="PyTorch's default GELU is the exact one; GPT-2 was trained with the tanh form.",
        see="Nothing for a model trained from scratch. An imported GPT-2 is a little worse than it should be, from "
        "the first step on.",
        test="tests/test_model.py::test_forward_by_hand",
        trained=False,
    ),
    Mutant(
        name="head-tied-by-its-data",
        file="minidpo/model.py",
        old="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight)",
        new="            return F.linear(hidden.to(self.wte.weight.dtype), self.wte.weight.data)",
        mistake="The head reads the embedding's numbers through .data, and no gradient comes back through it: tied "
        "in value, not in training.",
        see="A run that looks healthy and learns more slowly: the embedding hears only of the words that were read, "
        "not of those that were predicted.",
        test="tests/test_model.py::test_trap14_the_head_is_the_embedding",
    ),
    # ---- the step ----
    Mutant(
        name="mean-of-each-micro-batch",
        file="train_dpo.py",
        old="        (losses.sum() / len(indices)).backward()",
        new="        losses.mean().backward()",
        mistake="Each micro-batch is averaged by itself and the gradients are added: k micro-batches make it k times "
        "as long, and a short last one counts as much as a full one.",
        see="grad_norm is as many times too large as there are micro-batches (four here). AdamW divides by the scale "
        "of the gradient and hides the rest; clipping and SGD do not.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs",
        flags=("--micro-batch-size", "8"),
        shows="grad_norm",
    ),
    Mutant(
        name="zero-grad-forgotten",
        file="train_dpo.py",
        old="""\
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)""",
        new="    optimizer.step()",
        mistake="The gradients of all earlier steps stay and are added to.",
        see="grad_norm climbs above the clipping length of 10 and stays there. The margins grow too large, and the "
        "policy goes several times as far from the reference: each step repeats all those before it.",
        test="tests/test_loss.py::test_trap10_a_step_is_the_gradient_of_the_mean_over_its_pairs",
        shows="grad_norm",
    ),
    # ---- metrics ----
    Mutant(
        name="average-of-averages",
        file="train_dpo.py",
        old=EVALUATE,
        new=EVALUATE.replace("*logps)\n", "*logps) / len(indices)\n").replace(
            "means(sums, len(rows))",
            "means(sums, math.ceil(len(rows) / (settings.micro_batch_size or settings.batch_size)))",
        ),
        mistake="Each batch's mean is averaged, and the pairs of a short last batch count more than the others.",
        see="Held-out figures that are a little off, and change with the batch size.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs",
        trained=False,
    ),
    Mutant(
        name="ties-lost",
        file="train_dpo.py",
        old=WINS,
        new="(chosen_rewards > rejected_rewards).float()",
        mistake="A tie counts as a loss. Before the first update every pair is one.",
        see="The accuracy starts at 0 instead of one half, and the first step looks like great progress.",
        test="tests/test_loss.py::test_trap11_ties_are_one_half",
    ),
    Mutant(
        name="accuracy-without-the-reference",
        file="train_dpo.py",
        old=WINS,
        new="(chosen_logps > rejected_logps).float()",
        mistake="A win is counted where the policy finds the chosen response likelier, not where its reward is higher.",
        see="Training is right; the accuracy is that of another question. It starts away from one half and barely "
        "moves: on the toy the shorter response is the likelier one in four of five pairs.",
        test="tests/test_loss.py::test_trap11_metrics_are_means_over_pairs",
    ),
    Mutant(
        name="kl-on-the-references-samples",
        file="experiments/evaluate.py",
        old="ours.prompt_ids, ours.ids,",
        new="ours.prompt_ids, theirs.ids,",
        mistake="The KL is an expectation under the policy, and is taken on texts from elsewhere: the reference's "
        "samples or the pairs of the data set.",
        see="Nothing in training. The plain estimate comes out negative, which no KL is.",
        test="tests/test_experiments.py::test_trap15_sampled_ids_are_never_encoded_again",
        trained=False,
    ),
    Mutant(
        name="kl-per-token",
        file="experiments/evaluate.py",
        old="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1)",
        new="        plain[indices] = (at_sample.cpu().double() * mask).sum(-1) / mask.sum(-1)",
        mistake="Averaged over the tokens of a response, where the objective has the KL of the whole response.",
        see="Nothing in training. The distance comes out as many times too small as the response has tokens, and "
        "long responses seem as near as short ones.",
        test="tests/test_experiments.py::test_trap15_both_estimators_have_the_exact_kl_as_their_mean",
        trained=False,
    ),
    # ---- runs ----
    Mutant(
        name="warm-up-again",
        file="train_dpo.py",
        old="            lr = learning_rate(step, total,",
        new="            lr = learning_rate(step - first_step, total,",
        mistake="A resumed run counts its own steps for the schedule and warms up a second time.",
        see="The learning rate drops to its first value where the run was resumed, and ends too high.",
        test="tests/test_runs.py::test_trap18_10_steps_are_some_and_resume_and_the_rest[3-dpo-flags3]",
        resumed=True,
        shows="lr",
    ),
    Mutant(
        name="evaluation-moves-the-rng",
        file="minidpo/dataset.py",
        old="    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)",
        new="    generator = torch.default_generator",
        mistake="The shuffle draws from the global generator, and an evaluation in the middle of training shuffles "
        "too.",
        see="Nothing in the first epoch. After it, how often one evaluates changes the order of the pairs, and the "
        "weights.",
        test="tests/test_runs.py::test_trap17_evaluating_and_sampling_change_no_weights[sft]",
        trained=False,
    ),
    Mutant(
        name="wrapped-names-saved",
        file="minidpo/checkpoint.py",
        old='        name.replace("_orig_mod.", "").replace("module.", ""): weight.detach().cpu()',
        new="        name: weight.detach().cpu()",
        mistake="torch.compile and DistributedDataParallel put their own name in front of every weight, and it is "
        "saved along.",
        see="Nothing, until the checkpoint is to be loaded into a plain model and no name fits.",
        test="tests/test_model.py::test_trap19_a_wrappers_name_is_not_saved",
        trained=False,
    ),
]
