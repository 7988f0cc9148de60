def function_16(x):
    return x + 16
def function_16(x):
    return x + 16
def function_16(x):
    return x + 16
def function_16(x):
    return x + 16
def function_16(x):
    return x + 16
