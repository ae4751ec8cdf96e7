"""Operations on tensors that know no adapter: files of them, factors, largest entries, entropy codes. Floor 2, runtime."""
