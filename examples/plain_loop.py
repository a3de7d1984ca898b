"""RigL at 95% in a training loop of one's own, on scikit-learn's digits: `python examples/plain_loop.py`."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import sparse_lab

EPOCHS = 20
pixels, classes = (torch.tensor(array) for array in load_digits(return_X_y=True))
data = torch.utils.data.TensorDataset(pixels.float() / 16, classes)
train, test = torch.utils.data.random_split(data, [1500, 297], torch.Generator().manual_seed(0))
loader = torch.utils.data.DataLoader(train, batch_size=50, shuffle=True)

model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
handle = sparse_lab.sparsify(model, method="rigl", sparsity=0.95, total_steps=len(loader) * EPOCHS)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
handle.attach(optimizer)  # from here on masks hold, and change after optimizer.step()

for _ in range(EPOCHS):
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

print(handle.summary())
images, labels = (torch.stack(one) for one in zip(*test, strict=True))
print(f"test {100 * (model(images).argmax(1) == labels).float().mean():.1f}%")
torch.save(sparse_lab.plain_state_dict(model), "digits.pt")  # loads into the plain network
