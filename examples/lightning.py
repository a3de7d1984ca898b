"""EAST's schedule without its surgery, at 95%, as a callback of Lightning's Trainer: `python examples/lightning.py`."""

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import nn

import sparse_lab


class Digits(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


pixels, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = torch.utils.data.TensorDataset(pixels.float() / 16, classes)
sparsify = sparse_lab.callbacks.Sparsify(
    method="east", sparsity=0.95, sharing=None, dyrelu=None, cycles={"every": 5}, drop_and_grow={"update_every": 50}
)
trainer = pl.Trainer(max_epochs=20, callbacks=[sparsify], logger=False, enable_checkpointing=False, accelerator="cpu")
trainer.fit(Digits(), torch.utils.data.DataLoader(data, batch_size=50, shuffle=True))
print(sparsify.handle.summary())
