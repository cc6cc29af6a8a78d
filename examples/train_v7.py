"""
Trains an agent with ``TrainerV7``, from flags or a config file, as ``sb3-cyborg train`` does.

    python examples/train_v7.py --env CartPole-v1 --encoder fusion --memory kv --n-envs 8 --n-steps 2048 --burn-in 256 --amp
    python examples/train_v7.py --config configs/memory_ppo_v7.yaml --wandb

The same in a script::

    trainer = TrainerV7({"env": "CartPole-v1", "encoder": "fusion", "memory": "kv", "n_envs": 8})
    trainer.train(total_timesteps=100_000)
    trainer.save("checkpoints/model.pt")
"""

from sb3_cyborg.cli import train_main

if __name__ == "__main__":
    train_main()
