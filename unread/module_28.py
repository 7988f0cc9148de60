def function_28(x):
    return x + 28
def function_28(x):
    return x + 28
def function_28(x):
    return x + 28
def function_28(x):
    return x + 28
def function_28(x):
    return x + 28
