"""The forward pass of a block whose active task is a global of its module, -1 for the plain model."""

val_task_id = None


def forward(self, x):
    x = x + self.attention(self.ln_1(x))
    if not self.adapter_flag or (self.task_id > -1 and self.autorouter and val_task_id == -1):
        return x + self.mlp(self.ln_2(x))
    if self.task_id > -1:
        task = val_task_id if val_task_id is not None and self.autorouter else self.task_id
        mixed = self.mixture(x, self.router_list[task], self.w_noise_list[task])
    else:
        mixed = self.mixture(x, self.router1, self.w_noise, count=False)
    return x + self.mlp(self.ln_2(x)) + mixed
