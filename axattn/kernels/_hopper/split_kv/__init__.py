"""Few query rows over many keys: the keys are split among workers, whose results are combined."""
