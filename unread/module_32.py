def function_32(x):
    return x + 32
def function_32(x):
    return x + 32
def function_32(x):
    return x + 32
def function_32(x):
    return x + 32
def function_32(x):
    return x + 32
