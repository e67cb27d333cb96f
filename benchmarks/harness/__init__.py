"""What every benchmark shares: processes, measurement, the parity gate, tables, results, plots."""
