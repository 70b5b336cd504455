"""Studies, series and tables: what is read, and where it lies in the patient."""
