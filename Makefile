# make demo: train the mini world with DDPO, sample before and after, measure against phantoms, write a report.
# make demo-fundus: the second system on phantoms: generator, ratings, judges, rounds of improvement, report.
# make test: run the test suite. make lint: ruff and mypy. make mini-weights: retrain the mini world's models.
# Each creates .venv on first use.

PYTHON ?= python3
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export WANDB_SILENT := true
ifndef RUN
RUN := demo-$(shell date +%Y%m%d-%H%M%S)
endif
# these are the defaults; given here, the launcher does not print them
LAUNCH := accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no
OUT := rl4med-out/mini
MINI := config/mini.py

# the second system, in a folder of its own
FUNDUS := config/fundus.py
FROOT := rl4med-out/fundus-$(RUN)
FLAGS := --config.base_log_path=$(FROOT)
TWO := torchrun --standalone --nproc_per_node 2

.PHONY: demo demo-fundus test lint mini-weights

.venv/ready: setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

demo: .venv/ready
	$(LAUNCH) scripts/train.py --config $(MINI):prompt_image_alignment_classifier_isic --config.run_name=$(RUN) --config.held_out.every=4
	$(LAUNCH) scripts/eval.py --config $(MINI):prompt_image_alignment_classifier_isic_eval --config.logdir=$(OUT)/samples/$(RUN)/SD
	$(LAUNCH) scripts/eval.py --config $(MINI):prompt_image_alignment_classifier_isic_eval_rl --config.load_from=$(OUT)/logs/$(RUN) --config.logdir=$(OUT)/samples/$(RUN)/RL
	python -m ddpo_pytorch.phantoms.skin --out $(OUT)/held-out --seed 9 --balanced --num_train 0 --num_val 0 --num_test 1000
	$(LAUNCH) scripts/extract_dataset_latents.py --config $(MINI):preprocess_isic_real_data --config.dataset.data_path=$(OUT)/held-out/images --config.dataset.csv=$(OUT)/held-out/splits/phantom_test.csv --config.logdir=$(OUT)/samples/$(RUN)/real
	$(LAUNCH) scripts/metric.py --config $(MINI):evaluate_metric_rl --config.metric.folders=SD=$(OUT)/samples/$(RUN)/SD,SD+RL=$(OUT)/samples/$(RUN)/RL --config.metric.real_path=$(OUT)/samples/$(RUN)/real --config.metric.logs=$(RUN)=$(OUT)/logs/$(RUN) --config.metric.output=$(OUT)/metrics/$(RUN) --report
	@echo "tables, curves and pictures: $(OUT)/metrics/$(RUN)/report.html"
	@echo "all samples: $(OUT)/samples/$(RUN)/SD/images and .../RL/images; training grids: $(OUT)/logs/$(RUN)/grid_*.png"

# captions -> generator -> ratings by known degradations -> Selector and Policy -> rounds of improvement -> table 1
demo-fundus: export ACCELERATE_USE_CPU := true
demo-fundus: .venv/ready
	python -m ddpo_pytorch.phantoms.fundus --out $(FROOT)/data --degraded 0.5 --num_train 2000 --num_val 1000 --num_test 300
	$(TWO) scripts/train_sd.py --config $(FUNDUS):train_vae_mini $(FLAGS) --config.sd.batch_size=8
	$(TWO) scripts/train_sd.py --config $(FUNDUS):finetune_sd_mini $(FLAGS) --config.sd.batch_size=16
	python -m ddpo_pytorch.phantoms.rating_sets --csv $(FROOT)/data/splits/fundus_train.csv --data_path $(FROOT)/data --out $(FROOT)/ratings --resize stretch --structural 0 --limit 1000
	python -m ddpo_pytorch.phantoms.rating_sets --csv $(FROOT)/data/splits/fundus_val.csv --data_path $(FROOT)/data --out $(FROOT)/ratings-held-out --resize stretch --structural 0 --seed 1
	$(TWO) scripts/train_rlhf.py --config $(FUNDUS):train_rlhf_mini $(FLAGS) --config.rlhf.batch_size=16
	$(TWO) scripts/train_rlhf.py --config $(FUNDUS):train_rlhf_held_out_mini $(FLAGS) --config.rlhf.batch_size=16
	python scripts/improve.py --launch="$(TWO)" --config $(FUNDUS):improve_mini $(FLAGS) --config.sample.num_batches_per_epoch=2 --config.train.batch_size=32
	$(TWO) scripts/generate.py --config $(FUNDUS):generate_mini $(FLAGS)
	$(TWO) scripts/eval.py --config $(FUNDUS):eval_base_mini $(FLAGS)
	$(TWO) scripts/eval.py --config $(FUNDUS):eval_improved_mini $(FLAGS)
	$(TWO) scripts/extract_dataset_latents.py --config $(FUNDUS):real_images_mini $(FLAGS)
	$(TWO) scripts/metric.py --config $(FUNDUS):evaluate_metric_mini $(FLAGS) --report
	@echo "rounds: $(FROOT)/improve/rounds.md; tables and pictures: $(FROOT)/metrics/report.html"

# two workers, each on a core of its own and with one thread; files with slow tests first
test: export OMP_NUM_THREADS := 1
test: .venv/ready
	pytest -q -n 2 --dist loadfile --no-loadscope-reorder

# Rebuild ddpo_pytorch/assets/mini from scratch: phantom worlds, autoencoder, diffusion model, the two classifiers.
# The generator sees combinations of labels almost as often as they occur in ISIC; the autoencoder and the two judges see
# all of them equally often. In the judges' last epochs, half of the images have passed through the autoencoder, like the
# images that they will have to judge.
WORLD := $(OUT)/data
JUDGED := $(OUT)/judged
CLASSIFIER := $(LAUNCH) scripts/train_isic_classifier.py --data_path $(JUDGED)/images \
	--val_csv $(JUDGED)/splits/phantom_val.csv --arch tinynet_e --image_size 96 --batch_size 32
ORIGINALS := --checkpoint_dir $(OUT)/originals --weights none --learning_rate 2e-3 --num_epochs 12
BOTH := --checkpoint_dir $(OUT)/classifier --learning_rate 1e-3 --num_epochs 4 --through_vae $(OUT)/sd \
	--checkpoint $(OUT)/originals/artifact_classifier_H
TRAIN_SD := $(LAUNCH) scripts/train_sd.py --config

mini-weights: .venv/ready
	python -m ddpo_pytorch.phantoms.skin --out $(WORLD)
	python -m ddpo_pytorch.phantoms.skin --out $(OUT)/balanced --seed 1 --balanced --num_test 0
	$(TRAIN_SD) $(MINI):train_vae
	$(TRAIN_SD) $(MINI):finetune_sd
	python -m ddpo_pytorch.phantoms.skin --out $(JUDGED) --seed 2 --balanced --num_test 0
	$(CLASSIFIER) $(ORIGINALS) --num_classes 6 --train_csv $(JUDGED)/splits/phantom_train_a.csv --seed 6
	$(CLASSIFIER) $(ORIGINALS) --num_classes 4 --train_csv $(JUDGED)/splits/phantom_train_b.csv --seed 4
	$(CLASSIFIER) $(BOTH)6.safetensors --num_classes 6 --train_csv $(JUDGED)/splits/phantom_train_a.csv --seed 6
	$(CLASSIFIER) $(BOTH)4.safetensors --num_classes 4 --train_csv $(JUDGED)/splits/phantom_train_b.csv --seed 4
	@echo "copy $(OUT)/sd and $(OUT)/classifier/*.safetensors to ddpo_pytorch/assets/mini to ship them"

lint: .venv/ready
	ruff check .
	ruff format --check .
	mypy
